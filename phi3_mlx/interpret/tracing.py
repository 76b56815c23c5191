"""Passes that somebody looks into: what is kept of them, and what is changed in them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx

from ..engine.machine import room
from ..engine.plan import Workload, check_fits, check_room
from ..errors import OptionError, PromptError
from ..models.hooks import Computed, Segment, watched_by
from ..threads import turn
from ..values import listed, refusal, shown, token_ids
from .edits import Edit
from .keeping import Inside, Keep, Wanted, from_slots, kept_of, to_slots
from .selecting import Arrivals, Here
from .table import COMPUTED_BESIDE, heads_of, layers_of, place_of, places, working_numbers

if TYPE_CHECKING:
    from ..models.decoder import Model

_KEEP_LESS = "keep fewer places, layers, heads or positions"


class _Trace:
    """The watcher of a `trace`, see `hooks.Watcher`."""

    def __init__(self, model: Model, kept: Sequence[Wanted], edits: Sequence[Edit], force: bool):
        self.decoder, self._model, self._kept, self._force = model.model, model, kept, force
        self.inside = Inside(kept, model.config)
        self.edits = tuple(edits)
        self.is_open = True
        self.last: Sequence[Segment] = ()
        self._arrivals: dict[Edit, Arrivals] = {}
        self._changes: dict[tuple[str, int | None], list[tuple[Edit, list[int] | None]]] = {}
        for edit in edits:
            if not isinstance(edit, Edit):
                raise OptionError(f"edits has {shown(edit)}; make edits with change, patch, steer or switch_off")
            place = place_of(model.config, edit.place)
            if not place.changeable:
                raise OptionError(f"place {place.name} can be read alone")
            self._arrivals[edit] = Arrivals(f"an edit of {place.name}", edit.tokens)
            heads = heads_of(model.config, place, edit.heads)
            for layer in layers_of(model.config, place, edit.layers):
                self._changes.setdefault((place.name, layer), []).append((edit, heads))
        arrivals = [*self._arrivals.values(), *(wanted.arrivals for wanted in kept)]
        self._without_logits = [wanted for wanted in kept if wanted.place.name != "logits"]
        self._expected = [each for each in arrivals if each.expects]

    def wants(self, place: str, layer: int | None) -> bool:
        return self.inside.keeps(place, layer) or self.changes(place, layer)

    def changes(self, place: str, layer: int | None) -> bool:
        return (place, layer) in self._changes

    def begin(self, segments: Sequence[Segment], cached: bool) -> None:
        for arrivals in self._expected:
            for segment in segments:
                arrivals.begin(segment, cached)
        if not self._force and any(segment.length > 1 for segment in segments):
            self._check_room(segments)
        self.inside.begin(segments)

    def _check_room(self, segments: Sequence[Segment]) -> None:
        """MemoryLimitError for a pass that keeps or changes more than fits; logits are made behind it."""
        kept = working = 0
        for segment in segments:
            keys = segment.first + segment.length
            for wanted in self._without_logits:
                kept += segment.rows * self._bytes(wanted, len(wanted.tokens.among(segment)[0]), keys)
            working = max(working, segment.rows * self.working_bytes(segment.length, keys))
        if kept or working:
            check_room("what a trace keeps and changes in this pass", {"kept": kept, "work": working}, _KEEP_LESS)

    def check_prompts(self, lengths: Sequence[int]) -> None:
        """OptionError for positions that prompts of these lengths do not have."""
        for arrivals in self._expected:
            arrivals.check_prompts(lengths)

    def warn(self, stacklevel: int) -> None:
        """Say which positions never came."""
        for missing in filter(None, (arrivals.missing() for arrivals in self._expected)):
            warnings.warn(missing, stacklevel=stacklevel + 1)

    def reaches(self, place: str, layer: int | None, segments: Sequence[Segment]) -> bool:
        edits = [edit for edit, _ in self._changes.get((place, layer), ())]
        return any(edit.tokens.among(segment)[0] for edit in edits for segment in segments)

    def change(self, place: str, layer: int | None, x: mx.array, segment: Segment) -> mx.array:
        for edit, heads in self._changes[place, layer]:
            places, ordinals = edit.tokens.among(segment)
            if places:
                self._arrivals[edit].note(segment, places)
                positions = [segment.first + place for place in places]
                here = Here(layer, self.inside.rows_of(segment), positions, ordinals, heads)
                x = _changed(x, edit, here, places, segment)
        return x

    def keep(self, place: str, layer: int | None, compute: Computed, segment: Segment) -> None:
        if self.inside.keeps(place, layer):
            self.inside.keep(place, layer, compute, segment)

    def forget(self, segment: Segment) -> None:
        for arrivals in self._expected:
            arrivals.forget(segment)
        self.inside.forget(segment)

    def finish(self) -> None:
        mx.eval(self.inside.unfinished)

    def kept_bytes(self, tokens: int, scored: int) -> int:
        return sum(self._bytes(wanted, wanted.count(tokens, scored), tokens) for wanted in self._kept)

    def working_bytes(self, tokens: int, keys: int) -> int:
        config, itemsize = self._model.config, self._model.dtype.size
        changed = {place_of(config, name) for name, _ in self._changes}
        numbers = [working_numbers(config, place, keys) * place.itemsize(itemsize) for place in changed]
        # The heads of a layer are computed one by one, and there twice while they are joined.
        joined = [
            self._bytes(wanted, wanted.tokens.count(tokens), keys) // len(wanted.layers)
            for wanted in self._kept
            if wanted.place.name in COMPUTED_BESIDE and wanted.layers
        ]
        return tokens * max(numbers, default=0) + max(joined, default=0)

    def _bytes(self, kept: Wanted, tokens: int, keys: int) -> int:
        return kept.bytes(self._model.config, tokens, keys, self._model.dtype.size)


def _changed(x: mx.array, edit: Edit, here: Here, places: list[int], segment: Segment) -> mx.array:
    """x (rows, length, ...) after an edit of these places."""
    pattern, heads = edit.place == "pattern", here.heads
    part = x if len(places) == x.shape[1] else x[:, mx.array(places)]
    if heads is not None:
        part = part[:, :, mx.array(heads)]
    given = from_slots(part, segment).swapaxes(1, 2) if pattern else part
    new = edit.function(copy.copy(given), here)  # a copy, because functions write into what they get
    if not isinstance(new, mx.array):
        raise OptionError(f"an edit of {edit.place} gives {shown(new)}; it must return an MLX array, the new values")
    if new.shape != given.shape:
        raise OptionError(f"an edit of {edit.place} gives {new.shape} for {given.shape}; it must keep the shape")
    new = (to_slots(new.swapaxes(1, 2), part, segment) if pattern else new).astype(x.dtype)
    if part.shape == x.shape and heads is None:
        return new
    x = copy.copy(x)  # writing into it leaves the other as it was
    if heads is None:
        x[:, mx.array(places)] = new
    else:
        x[:, mx.array(places)[:, None], mx.array(heads)] = new
    return x


@contextmanager
def trace(
    model: Model,
    keep: Iterable[Keep | str] | Keep | str = (),
    edits: Iterable[Edit] | Edit = (),
    *,
    force: bool = False,
) -> Iterator[Inside]:
    """Look into all passes of this thread through a model until the block ends, and change them.

        with trace(model, keep=["resid_post", Keep("pattern", layers=3, positions=-1)]) as inside:
            logits = model(ids)
        stream = inside["resid_post", 3]  # (B, L, hidden_size)

    It serves `model(ids)`, `generate`, `stream_generate`, `batch_generate` and whatever else runs the model. `keep`:
    names of places (`places`), or `Keep`s of some layers, heads and positions. `edits`: what `change`, `patch`,
    `steer` and `switch_off` make; they are done in their order, those of a trace around this one first, and what is
    kept is what the model went on with. A cache that was read under edits serves no run without them. At the end, also
    after an error, the model is as it was.

    Raises OptionError for a place, layer or head that is not there, MemoryLimitError inside for more than fits, unless
    `force`.
    """
    watcher = _trace_of(model, keep, edits, force)
    with _open(watcher):
        yield watcher.inside
    watcher.warn(stacklevel=3)


def inspect(
    model: Model,
    ids: Sequence[int] | Sequence[Sequence[int]] | mx.array,
    keep: Iterable[Keep | str] | Keep | str,
    edits: Iterable[Edit] | Edit = (),
    *,
    force: bool = False,
) -> Inside:
    """Read token ids, one list or several, and return what is kept of it, as `trace`'s.

    They are read in chunks, as a prompt is, so long ones take memory for what is kept and little more. Lists of several
    lengths are read together, and give each what it gives alone. Raises PromptError for ids that cannot be read,
    MemoryLimitError for more than fits, unless `force`.
    """
    watcher = _trace_of(model, keep, edits, force)
    rows, padding = _rows(ids, model.config.vocab_size)
    batch, length = rows.shape
    watcher.check_prompts([length - before for before in padding])
    with _open(watcher), turn():
        workload = Workload.of_model(model, length, batch)
        plan = workload.plan(room() + workload.weights) if force else check_fits(workload, room() + workload.weights)
        cache = model.make_cache([length - before for before in padding], padding if any(padding) else None)
        for first in range(0, length, plan.chunk):
            hidden = model.model(rows[:, first : first + plan.chunk], cache)
            if watcher.wants("logits", None):
                model.logits(hidden)
            mx.eval(hidden, watcher.inside.unfinished)
    return watcher.inside


def _trace_of(
    model: Model, keep: Iterable[Keep | str] | Keep | str, edits: Iterable[Edit] | Edit, force: bool
) -> _Trace:
    places(model)
    given = [edits] if isinstance(edits, Edit) else edits
    if not isinstance(given, Iterable):
        raise refusal(edits, "edits", "a list of what change, patch, steer and switch_off make")
    return _Trace(model, kept_of(keep, model.config), list(given), force)


@contextmanager
def _open(watcher: _Trace) -> Iterator[None]:
    try:
        with watched_by(watcher):
            yield
    finally:
        watcher.is_open = False


def _rows(ids: Sequence[int] | Sequence[Sequence[int]] | mx.array, vocab_size: int) -> tuple[mx.array, list[int]]:
    """Token ids as (B, L), and how many stand before each row's own to make it as long as the others."""
    several = listed(ids) or []
    lists = [token_ids(row) or [] for row in ([several] if token_ids(several) is not None else several)]
    if not lists or not all(lists):
        raise PromptError(f"ids is {shown(ids)}; expected token ids, or some lists of them")
    for token in (token for row in lists for token in row):
        if not 0 <= token < vocab_size:
            raise PromptError(f"id {token} is outside the vocabulary of {vocab_size:,}")
    longest = max(map(len, lists))
    padding = [longest - len(row) for row in lists]
    return mx.array([[0] * before + row for before, row in zip(padding, lists, strict=True)]), padding
