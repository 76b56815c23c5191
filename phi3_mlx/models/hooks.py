"""How a place in a model is read or replaced: a module at its path, or a value while a pass computes it.

A module calls `at("resid_mid", x)` where it has a value that somebody may want to look at. Without a watcher that is
`x` itself: no wrapper stands anywhere, and MLX gets the same operations. A watcher is one thread's, and of one model;
while it is there layers take the plain path, which is not compiled (`decoder`).

A pass reads tokens of one sequence or of several. Its *segments* say which: a value is (rows, length, ...) of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..errors import CacheError, OptionError
from .cache import KVCache

# Modules


def get_layer(model: nn.Module, path: str) -> Any:
    """The module at a dotted path such as "model.layers.0.mlp.down_proj"."""
    layer: Any = model
    for step in path.split("."):
        layer = layer[int(step)] if step.isdigit() else layer[step]
    return layer


def set_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(get_layer(model, parent) if parent else model, name, layer)


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """These modules at these paths, until the block ends."""
    before = {path: get_layer(model, path) for path in layers}
    try:
        for path, layer in layers.items():
            set_layer(model, path, layer)
        yield
    finally:
        for path, layer in before.items():
            set_layer(model, path, layer)


# Values


class Segment(NamedTuple):
    """`length` tokens of each of `rows` sequences, which a pass reads side by side.

    `key` says which sequences; `row`, which of them alone, None for all. `first`: the position of their first token,
    below 0 where padding stands before it. `prompt`: how many tokens of a prompt were read or declared, and
    `declared`, whether it can have no more. `padding`: places of keys before the first token.
    """

    key: Hashable
    rows: int
    first: int
    length: int
    prompt: int
    padding: int = 0
    declared: bool = True
    row: int | None = None


# Of some heads and places (axis 1) of a segment: (rows, places, heads, ...).
Computed = Callable[[Sequence[int] | None, Sequence[int] | None], mx.array]


class ChangeOfValues(Protocol):
    """What a watcher changes; told apart by identity."""

    @property
    def by_prompt(self) -> bool:
        """Whether it depends on where the prompt ends, what it changes."""


class Watcher(Protocol):
    """What looks at the values of a model, and changes them."""

    decoder: nn.Module
    is_open: bool  # False: it has ended
    last: Sequence[Segment]  # of the last pass, for the logits that are made of it

    @property
    def edits(self) -> tuple[ChangeOfValues, ...]:
        """All that it changes."""

    def wants(self, place: str, layer: int | None) -> bool:
        """Whether a value is kept or changed."""

    def changes(self, place: str, layer: int | None) -> bool:
        """Whether a value is changed."""

    def reaches(self, place: str, layer: int | None, segments: Sequence[Segment]) -> bool:
        """Whether a value of some of these tokens is changed."""

    def change(self, place: str, layer: int | None, x: mx.array, segment: Segment) -> mx.array:
        """The value to go on with: x (rows, length, ...), or x itself."""

    def keep(self, place: str, layer: int | None, compute: Computed, segment: Segment) -> None:
        """Keep of a value what is wanted of it."""

    def begin(self, segments: Sequence[Segment], cached: bool) -> None:
        """A pass begins; behind one without a cache comes no more of its sequences."""

    def forget(self, segment: Segment) -> None:
        """The tokens of a sequence from the segment's first on are gone."""

    def finish(self) -> None:
        """A pass that extends a cache ends: what was kept is to be computed."""

    def kept_bytes(self, tokens: int, scored: int) -> int:
        """Bytes of what is kept of a sequence of this many tokens, with logits of `scored` of them."""

    def working_bytes(self, tokens: int, keys: int) -> int:
        """Bytes beside what is kept, while this many tokens of a sequence are read that see `keys` keys."""


class WatchedPass:
    """A pass that is watched. `layer`: the one that computes now, None before the first and behind the last."""

    def __init__(self, watchers: Sequence[Watcher], segments: Sequence[Segment]):
        self.watchers, self._segments = watchers, segments
        self.layer: int | None = None
        self.segments = segments  # those of the value that is computed now

    def turn_to(self, segment: int | None) -> None:
        """The next values are of this segment alone; None: of all."""
        self.segments = self._segments if segment is None else self._segments[segment : segment + 1]

    def wants(self, place: str) -> bool:
        return any(watcher.wants(place, self.layer) for watcher in self.watchers)

    def at(self, place: str, x: mx.array) -> mx.array:
        if not self.wants(place):
            return x
        before = self._apart(x)
        after = [self._at(place, part, segment) for part, segment in zip(before, self.segments, strict=True)]
        if all(new is old for new, old in zip(after, before, strict=True)):
            return x
        return mx.concatenate([part.flatten(0, 1) for part in after]).reshape(x.shape)

    def beside(self, place: str, compute: Computed, rows: int) -> mx.array | None:
        if any(watcher.reaches(place, self.layer, self.segments) for watcher in self.watchers):
            before = compute(None, None)
            after = self.at(place, before)
            return None if after is before else after - before
        first = 0
        for row, segment in enumerate(self.segments):
            if len(self.segments) == 1:
                self._keep(place, compute, segment)
            elif len(self.segments) == rows:
                self._keep(place, _of_row(compute, row), segment)
            else:  # side by side in one row
                self._keep(place, _of_tokens(compute, first, segment.length), segment)
            first += segment.length
        return None

    def _apart(self, x: mx.array) -> list[mx.array]:
        """x with the tokens of all segments in its first two axes -> (rows, length, ...) of each."""
        if len(self.segments) == 1:
            return [x.reshape(self.segments[0].rows, self.segments[0].length, *x.shape[2:])]
        tokens, first, parts = x.flatten(0, 1), 0, []
        for segment in self.segments:
            last = first + segment.rows * segment.length
            parts.append(tokens[first:last].reshape(segment.rows, segment.length, *x.shape[2:]))
            first = last
        return parts

    def _at(self, place: str, x: mx.array, segment: Segment) -> mx.array:
        for watcher in self.watchers:
            if watcher.changes(place, self.layer):
                with _aside():  # it may run parts of this model, or another one
                    x = watcher.change(place, self.layer, x, segment)

        def compute(heads: Sequence[int] | None, places: Sequence[int] | None) -> mx.array:
            part = x if places is None else x[:, mx.array([*places])]
            return part if heads is None else part[:, :, mx.array([*heads])]

        self._keep(place, compute, segment)
        return x

    def _keep(self, place: str, compute: Computed, segment: Segment) -> None:
        for watcher in self.watchers:
            if watcher.wants(place, self.layer):
                watcher.keep(place, self.layer, compute, segment)


def _of_row(compute: Computed, row: int) -> Computed:
    return lambda heads, places: compute(heads, places)[row : row + 1]


def _of_tokens(compute: Computed, first: int, length: int) -> Computed:
    def part(heads: Sequence[int] | None, places: Sequence[int] | None) -> mx.array:
        return compute(heads, [first + place for place in (range(length) if places is None else places)])

    return part


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())
_pass: ContextVar[WatchedPass | None] = ContextVar("pass", default=None)


@contextmanager
def _aside() -> Iterator[None]:
    """What is computed in this block is none of the pass."""
    token = _pass.set(None)
    try:
        yield
    finally:
        _pass.reset(token)


def at(place: str, x: mx.array) -> mx.array:
    """The value to go on with at a place: x itself, unless it is changed.

    x has the tokens of all segments in its first two axes, as (rows, length, ...) or (1, tokens, ...).
    """
    current = _pass.get()
    return x if current is None else current.at(place, x)


def at_flat(place: str, x: mx.array) -> mx.array:
    """`at` of x (tokens, ...)."""
    current = _pass.get()
    return x if current is None else current.at(place, x[None])[0]


def beside(place: str, compute: Computed, rows: int) -> mx.array | None:
    """What to add to a value (rows, length, heads, ...) that the model does not compute itself, None for nothing.

    What was computed without it stays as it is, bit for bit, where a change gives what was there.
    """
    current = _pass.get()
    return None if current is None else current.beside(place, compute, rows)


def wanted(*places: str) -> bool:
    """Whether somebody looks at one of these places of the layer that computes now."""
    current = _pass.get()
    return current is not None and any(map(current.wants, places))


def turn_to(segment: int | None) -> None:
    """Say of which segment the next values are; None: of all."""
    current = _pass.get()
    if current is not None:
        current.turn_to(segment)


def enter_layer(layer: int | None) -> None:
    """Say which layer computes the next values."""
    current = _pass.get()
    if current is not None:
        current.layer = layer


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """This thread's passes through the watcher's model are watched, until the block ends; further ones come inside."""
    _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.set(tuple(other for other in _watchers.get() if other is not watcher))


def watchers_of(decoder: nn.Module) -> tuple[Watcher, ...]:
    """Who watches a decoder in this thread, the outermost first."""
    watchers = _watchers.get()
    return watchers and tuple(watcher for watcher in watchers if watcher.decoder is decoder and watcher.is_open)


@contextmanager
def watched_pass(watchers: Sequence[Watcher], segments: Sequence[Segment], cached: bool) -> Iterator[None]:
    """A pass through these segments; what is kept of one with a cache is computed at its end."""
    for watcher in watchers:
        watcher.last = segments
        watcher.begin(segments, cached)
    token = _pass.set(WatchedPass(watchers, segments))
    try:
        yield
    finally:
        _pass.reset(token)
    if cached:
        for watcher in watchers:
            watcher.finish()


def at_end(decoder: nn.Module, place: str, x: mx.array, tokens: Sequence[int] | None) -> mx.array:
    """`at` of what is made of a pass that has ended: x (..., width) of these tokens of it, of all without them."""
    watchers = watchers_of(decoder)
    if not any(watcher.wants(place, None) for watcher in watchers):
        return x
    segments = watchers[0].last
    if tokens is not None:
        segments = _parts_of(segments, tokens)
    shape = x.shape
    if x.size // shape[-1] != sum(segment.rows * segment.length for segment in segments):
        raise OptionError(f"{place} are of other tokens than the last pass, so nobody can tell whose they are")
    return WatchedPass(watchers, segments).at(place, x.reshape(1, -1, shape[-1])).reshape(shape)


def _parts_of(segments: Sequence[Segment], tokens: Sequence[int]) -> list[Segment]:
    """Some tokens of a pass, by their places in it; those that follow one another are one segment."""
    owners = [
        (segment, row, segment.first + place)
        for segment in segments
        for row in range(segment.rows)
        for place in range(segment.length)
    ]
    parts: list[Segment] = []
    for segment, row, position in (owners[token] for token in tokens):
        part = segment._replace(rows=1, first=position, length=1, row=None if segment.rows == 1 else row)
        before = parts[-1] if parts else None
        if before and (before.key, before.row) == (part.key, part.row) and before.first + before.length == position:
            parts[-1] = before._replace(length=before.length + 1)
        else:
            parts.append(part)
    return parts


def segments_of(cache: Sequence[KVCache], batch: int, length: int) -> list[Segment]:
    """A segment for each row of a cache that is about to read `length` tokens."""
    sequence, offset = cache[0].sequence, cache[0].offset
    padding = sequence.left_padding or (0,) * batch
    keys = [sequence.stands_for or (sequence, row) for row in range(batch)]
    return [
        Segment(key, 1, offset - before, length, key[0].prompt_of(key[1]), before, key[0].prompt is not None)
        for key, before in zip(keys, padding, strict=True)
    ]


def forget_trimmed(decoder: nn.Module, cache: Sequence[KVCache]) -> None:
    """Say that tokens were trimmed from a cache of one row, for good: guesses that were wrong."""
    for watcher in watchers_of(decoder):
        watcher.forget(segments_of(cache, 1, 0)[0])


# Edits and what was read under them


def edits_of(decoder: nn.Module) -> tuple[ChangeOfValues, ...]:
    """All edits of a decoder's values that this thread has now."""
    return tuple(edit for watcher in watchers_of(decoder) for edit in watcher.edits)


def check_edits(decoder: nn.Module, cache: Sequence[KVCache]) -> None:
    """CacheError unless a cache has read all that it has under the edits that there are now, and no others."""
    sequence, edits = cache[0].sequence, edits_of(decoder)
    if not cache[0].offset:
        sequence.edits = edits
    elif sequence.edits != edits:
        was = f"{len(sequence.edits)} edits" if sequence.edits else "no edits"
        now = f"{len(edits)} others" if edits else "none"
        raise CacheError(f"this cache was read under {was} of the model, and there are {now} now; read the prompt anew")
