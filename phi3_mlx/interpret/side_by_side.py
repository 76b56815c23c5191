"""The same prompt under many edits: several runs side by side, as rows of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OptionError
from ..threads import turn
from ..values import shown, token_ids, whole
from .edits import Edit
from .keeping import Inside, Keep
from .selecting import Here
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model

Metric = Callable[[mx.array], mx.array]  # logits of the last token (runs, V) in float32 -> (runs,)
LAST_NORMED = Keep("final_norm", positions=[-1])


def logit_difference(token: int, against: int) -> Metric:
    """The logit of a token less that of another one, for `measure_edits`, `patch_positions` and the like.

    It raises OptionError for ids outside the vocabulary.
    """
    right, wrong = whole(token, "token"), whole(against, "against")

    def difference(logits: mx.array) -> mx.array:
        for each in (right, wrong):
            check_token(each, logits.shape[-1])
        return logits[:, right] - logits[:, wrong]

    return difference


def check_token(token: int, vocab_size: int) -> None:
    """OptionError for an id outside the vocabulary, where MLX would read other memory."""
    if not 0 <= token < vocab_size:
        raise OptionError(f"token {token} is outside the vocabulary of {vocab_size:,}")


def measure_edits(
    model: Model,
    ids: Sequence[int] | mx.array,
    variants: Iterable[Iterable[Edit] | Edit],
    metric: Metric,
    *,
    batch: int = 8,
) -> mx.array:
    """The metric of a prompt under each list of edits, [] for none: (variants,) in float32.

        measure_edits(model, ids, [[], [switch_off(3, 1)], [switch_off(3, 2)]], logit_difference(owl, cat))

    `metric(logits)` gets the logits of the last token of some runs (runs, V), in float32, and gives a number for each
    (runs,). `batch` of them are computed together, which is faster; each as if it ran alone, but for rounding. Raises
    what `inspect` raises: MemoryLimitError for more than fits.
    """
    prompt = ids_of_prompt(ids)
    listed = [[edits] if isinstance(edits, Edit) else list(edits) for edits in variants]
    measured = []
    for first in range(0, len(listed), at_least_one(batch)):
        runs = listed[first : first + batch]
        inside = inspect(model, [prompt] * len(runs), LAST_NORMED, each_for_its_row(runs))
        measured.append(measured_by(metric, model, inside))
    return mx.concatenate(measured) if measured else mx.zeros(0)


def measured_by(metric: Metric, model: Model, inside: Inside) -> mx.array:
    """The metric of runs that kept `LAST_NORMED`: (runs,) in float32. OptionError for what is no number a run."""
    with turn():
        logits = model.head(inside["final_norm"][:, 0]).astype(mx.float32)
        mx.eval(logits)
    values = mx.array(metric(logits)).astype(mx.float32)
    if values.shape != logits.shape[:1]:
        raise OptionError(f"the metric gives {values.shape} for {logits.shape}; it must give a number for each run")
    mx.eval(values)
    return values


def each_for_its_row(runs: Sequence[Sequence[Edit]]) -> list[Edit]:
    """The edits of runs that are rows of one pass."""
    return [_for_row(edit, row) for row, edits in enumerate(runs) for edit in edits]


def _for_row(edit: Edit, row: int) -> Edit:
    """An edit that changes this row alone, as the only row of its run."""
    if not isinstance(edit, Edit):
        raise OptionError(f"variants has {shown(edit)}; make edits with change, patch, steer or switch_off")

    def function(x: mx.array, here: Here) -> mx.array:
        if row not in here.rows:
            return x
        place = here.rows.index(row)
        mine = x if len(here.rows) == 1 else x[place : place + 1]
        new = edit.function(mine, here._replace(rows=[0]))
        return new if len(here.rows) == 1 else mx.concatenate([x[:place], new, x[place + 1 :]])

    return replace(edit, function=function)


def ids_of_prompt(ids: Sequence[int] | mx.array) -> list[int]:
    """Ids of one sequence. Raises OptionError for others."""
    prompt = token_ids(ids)
    if not prompt:
        raise OptionError(f"ids is {shown(ids)}; expected the token ids of one sequence")
    return prompt


def at_least_one(batch: int) -> int:
    """A whole number from 1 on."""
    if whole(batch, "batch") < 1:
        raise OptionError(f"batch is {batch}; expected 1 or more")
    return batch
