"""Activation patching: one run's values put into another, place by place, and what that does to its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OptionError
from ..values import listed, whole
from .edits import Edit, patch
from .keeping import Inside, Keep
from .selecting import LayerIndexes, Positions
from .side_by_side import LAST_NORMED, Metric, ids_of_prompt, measure_edits, measured_by
from .table import heads_in, indexes_of, place_of
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model

PositionGroups = Sequence[int | Sequence[int]]  # positions, or groups of them that are patched together


@dataclass(frozen=True, eq=False, repr=False)
class PatchGrid:
    """The metric of corrupted runs that each have some values of the clean run: `values` (rows, columns).

    `clean` and `corrupted` are the metrics of the two runs themselves. `rows` are layers; `columns` are groups of
    positions, or heads.
    """

    values: mx.array
    clean: float
    corrupted: float
    rows: list[int]
    columns: list[list[int]] | list[int]

    @property
    def restored(self) -> mx.array:
        """How much of the difference of the two runs each patch brings back: 0 nothing, 1 all (rows, columns).

        Raises OptionError where the two do not differ.
        """
        if self.clean == self.corrupted:
            raise OptionError(f"both runs have the metric {self.clean:g}, so there is nothing to restore; see values")
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    def __repr__(self) -> str:
        shape = "{} layers x {} columns".format(*self.values.shape)
        return f"<PatchGrid: {shape}, clean {self.clean:.3f}, corrupted {self.corrupted:.3f}>"


class ContrastedPrompts:
    """A clean and a corrupted prompt of one length, and how their answers are measured.

    `values` is what was kept of the clean run. Raises OptionError for prompts of two lengths.
    """

    def __init__(
        self,
        model: Model,
        clean: Sequence[int] | mx.array,
        corrupted: Sequence[int] | mx.array,
        metric: Metric,
        keep: Keep,
        batch: int,
    ):
        self._model, self._metric, self._batch = model, metric, batch
        right, self._corrupted = ids_of_prompt(clean), ids_of_prompt(corrupted)
        self.length = len(right)
        if len(self._corrupted) != self.length:
            raise OptionError(
                f"the prompts have {self.length:,} and {len(self._corrupted):,} tokens; a patch needs one length"
            )
        same = [ours == theirs for ours, theirs in zip(right, self._corrupted, strict=True)]
        self.first_difference = same.index(False) if False in same else self.length
        self.values: Inside = inspect(model, right, [keep, LAST_NORMED])
        self.clean = float(measured_by(metric, model, self.values))
        self.corrupted = float(measure_edits(model, self._corrupted, [[]], metric))

    def measured(self, variants: Sequence[Edit | None]) -> list[float]:
        """The metric of the corrupted prompt under each edit; None for what changes nothing, which is not run."""
        needed = [edit for edit in variants if edit is not None]
        values = iter(measure_edits(self._model, self._corrupted, needed, self._metric, batch=self._batch))
        return [self.corrupted if edit is None else float(next(values)) for edit in variants]

    def grid(self, values: Sequence[float], rows: list[int], columns: list[list[int]] | list[int]) -> PatchGrid:
        return PatchGrid(
            mx.array([*values]).reshape(len(rows), len(columns)), self.clean, self.corrupted, rows, columns
        )


def patch_positions(
    model: Model,
    clean: Sequence[int] | mx.array,
    corrupted: Sequence[int] | mx.array,
    metric: Metric,
    *,
    place: str = "resid_pre",
    layers: LayerIndexes = None,
    positions: PositionGroups | None = None,
    batch: int = 8,
) -> PatchGrid:
    """Read the corrupted prompt with the clean one's values at a place, of one layer and position at a time.

    `clean` and `corrupted`: ids of one length. `metric`, `batch`: as `measure_edits` takes them. `positions`: None for
    each of them; else some, where a list in the list is patched as one, such as the tokens of a word or a sentence.
    Positions before the first token that differs change nothing and are not run. Raises OptionError for prompts of two
    lengths, and what `inspect` raises.
    """
    columns = _groups(positions, len(ids_of_prompt(clean)))
    kept = Keep(place, layers=layers, positions=sorted({position for group in columns for position in group}))
    pair = ContrastedPrompts(model, clean, corrupted, metric, kept, batch)
    rows = pair.values.layers(place)
    variants = [
        patch(place, pair.values, layers=layer, positions=group) if max(group) >= pair.first_difference else None
        for layer in rows
        for group in columns
    ]
    return pair.grid(pair.measured(variants), rows, columns)


def patch_heads(
    model: Model,
    clean: Sequence[int] | mx.array,
    corrupted: Sequence[int] | mx.array,
    metric: Metric,
    *,
    place: str = "z",
    layers: LayerIndexes = None,
    positions: Positions = None,
    batch: int = 8,
) -> PatchGrid:
    """Read the corrupted prompt with the clean one's values of one head at a time, at all `positions` or some.

    `place`: "z", what heads give, or another that has heads, such as "q" or "pattern". Else as `patch_positions`.
    """
    named = place_of(model.config, place)
    if named.heads is None or not named.per_layer:
        raise OptionError(f"place {place} has no heads; use patch_positions")
    pair = ContrastedPrompts(model, clean, corrupted, metric, Keep(place, layers=layers, positions=positions), batch)
    rows, heads = pair.values.layers(place), list(range(heads_in(model.config, named)))
    variants = [
        patch(place, pair.values, layers=layer, heads=head, positions=positions) for layer in rows for head in heads
    ]
    return pair.grid(pair.measured(variants), rows, heads)


def _groups(positions: PositionGroups | None, length: int) -> list[list[int]]:
    """Positions from 0 on, in their groups."""
    if positions is None:
        return [[position] for position in range(length)]
    groups = []
    for group in positions:
        several = listed(group) if not isinstance(group, int) else [group]
        if not several:
            raise OptionError("positions has a group that is empty, or is no list of whole numbers")
        groups.append(indexes_of([whole(position, "positions") for position in several], length, "position"))
    if not groups:
        raise OptionError("positions has none; give one or more")
    return groups
