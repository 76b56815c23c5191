"""Rows of like length keep their keys and values in arrays that they share, so that one call attends for all of them.

    row 0   | a b c d e f g . . |
    row 1   | - - - p q r s . . |      -: before the row begins, never seen    .: room for the next tokens

Rows that decode a token each write it at the same place, and one call of attention in a layer, with a mask for what
lies before a row begins, serves them all. Keys are rotated before they are stored, so positions and LongRoPE's regimes
stay each row's own.

A row that shares arrays keeps its list of caches, whose layers are `SharedKVCache`s meanwhile. Whoever asks one of
them for its arrays, or trims it, takes the row out: its layers are plain `KVCache`s again, as if it had been alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .attention import Mask, make_mask
from .cache import KVCache, SequenceState

# How much longer than the shortest of the rows that share arrays the longest may be: what lies before a row begins
# costs memory, and time on the CPU.
LIKE = KVCache.step
# Tokens that a row must have brought one by one. Who comes or goes makes all rows of like length move, which does not
# pay for an answer of a few words, nor for one whose form dictates several tokens at once now and then.
SETTLED = 8


@dataclass(frozen=True)
class Unit:
    """What one call of attention serves: `rows`, of one token each, the `layers` of their cache, and the mask."""

    rows: Sequence[int]
    layers: Sequence[KVCache]
    mask: Mask = None


def units_of(caches: Sequence[Sequence[KVCache]], *, share: bool) -> list[Unit]:
    """How rows with these caches are attended to, a token of each. With `share` those of like length share arrays.

    Here rows are brought together, and leave those that are not among them or of like length any more.
    """
    slots = [_slots_of(cache) for cache in caches]
    if slots and slots[0] is not None and slots == [slots[0]] * slots[0].size:
        return [slots[0].unit(caches, range(len(caches)))]
    units: list[Unit] = []
    groups: dict[SharedSlots, list[int]] = {}
    loose: list[int] = []
    for row, cache in enumerate(caches):
        if (shared := slots[row]) is not None:
            groups.setdefault(shared, []).append(row)
        elif share and _may_share(cache):
            loose.append(row)
        else:
            units.append(Unit([row], cache))
    for rows in _with_loose(list(groups.values()), loose, [cache[0].offset for cache in caches]):
        former, present = slots[rows[0]], [caches[row] for row in rows]
        if former is None or any(slots[row] is not former for row in rows) or former.size != len(rows):
            former = _rearranged(present, [] if former is None else former.others(present))
        units.append(Unit(rows, present[0]) if former is None else former.unit(caches, rows))
    return units


def take_out(caches: Sequence[Sequence[KVCache]]) -> None:
    """Give rows arrays of their own, where they share some with others."""
    leaving: dict[SharedSlots, list[Sequence[KVCache]]] = {}
    for cache in caches:
        if (shared := _slots_of(cache)) is not None:
            leaving.setdefault(shared, []).append(cache)
    for shared, rows in leaving.items():
        _rearranged(shared.others(rows), rows)


class SharedSlots:
    """Arrays that some rows share: `layers`, each a cache of as many rows.

    Rows are taken in while it is made. For others to come, or some to leave, another is made.
    """

    def __init__(self, caches: Sequence[Sequence[KVCache]]):
        self.size = len(caches)
        self.layers: list[KVCache] = []
        self._longest = max(cache[0].offset for cache in caches)
        self._sequence = SequenceState(left_padding=tuple(self._longest - cache[0].offset for cache in caches))
        # Weakly: rows keep the arrays alive, so who lets go of all rows frees them.
        self._rows = [[weakref.ref(layer) for layer in cache] for cache in caches]

    def take_in(self, layers: Sequence[KVCache]) -> None:
        """Copy the next layer of all rows, which is theirs from now on."""
        cache = KVCache(self._sequence, layers[0].window)
        cache.offset = self._longest
        cache.start = max(0, cache.first_visible - cache.spare) if cache.window is not None else 0
        used = cache.offset - cache.start
        slots = (used // cache.step + 1) * cache.step
        like = layers[0].tokens
        cache.state = [mx.zeros((self.size, array.shape[1], slots, array.shape[3]), array.dtype) for array in like]
        for place, layer in enumerate(layers):
            for array, tokens in zip(cache.state, layer.tokens, strict=True):
                newest = tokens[0, :, -used:]
                array[place, :, used - newest.shape[1] : used] = newest
        mx.eval(cache.state)  # or all layers would exist twice
        for place, layer in enumerate(layers):
            SharedKVCache.take_over(layer, self, cache, place)
        self.layers.append(cache)

    def unit(self, caches: Sequence[Sequence[KVCache]], rows: Sequence[int]) -> Unit:
        """The unit of all its rows, which are `rows` of those with these caches."""
        order = sorted(rows, key=lambda row: caches[row][0].place)  # type: ignore[attr-defined]
        return Unit(order, self.layers, make_mask(1, self.layers[0].window, self.layers[0]))

    def others(self, caches: Sequence[Sequence[KVCache]]) -> list[list[SharedKVCache]]:
        """Its rows but those with these caches; who was let go of is none of them."""
        there = {id(layer) for cache in caches for layer in cache}
        others: list[list[SharedKVCache]] = []
        for row in self._rows:
            held = [layer for ref in row if isinstance(layer := ref(), SharedKVCache) and layer.slots is self]
            if len(held) == len(row) and id(held[0]) not in there:
                others.append(held)
            elif len(held) < len(row):  # a call was broken off while they moved
                for layer in held:
                    layer.leave()
        return others

    def take_out(self, layer: SharedKVCache) -> None:
        """Give the row of a layer arrays of its own."""
        rows = self.others([])
        leaving = [row for row in rows if any(layer is other for other in row)]
        _rearranged([row for row in rows if row not in leaving], leaving)


class SharedKVCache(KVCache):
    """A layer of a row whose keys and values lie in `shared`, at `place`, beside those of other rows."""

    slots: SharedSlots
    shared: KVCache
    place: int
    before: int  # what to add to a position of the row for that in `shared`
    oldest: int  # position of the oldest token that came in

    @staticmethod
    def take_over(layer: KVCache, slots: SharedSlots, shared: KVCache, place: int) -> None:
        """Let a layer have its tokens in `shared`, where they were copied to, and no arrays of its own."""
        before, oldest = shared.offset - layer.offset, layer.start
        vars(layer).update(slots=slots, shared=shared, place=place, before=before, oldest=oldest)
        layer.__class__ = SharedKVCache  # a Ctrl-C before leaves it as it was
        vars(layer).pop("state", None)

    def leave(self) -> None:
        """Become a plain cache again, with a copy of the row's tokens."""
        plain = KVCache(self.sequence, self.window)
        plain.begin_with([self.tokens], self.start)
        vars(self).update(state=plain.state, start=plain.start, offset=plain.offset)
        self.__class__ = KVCache  # type: ignore[assignment]
        for name in ("slots", "shared", "place", "before", "oldest"):  # the first two keep the others' arrays alive
            vars(self).pop(name)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        self.slots.take_out(self)  # a copy is of a row alone
        return self.__reduce_ex__(protocol)

    @property
    def tokens(self) -> list[mx.array]:
        first, end = self.start + self.before - self.shared.start, self.shared.offset - self.shared.start
        return [array[self.place : self.place + 1, :, first:end] for array in self.shared.state]

    @property
    def kept(self) -> list[mx.array]:
        return self.shared.state

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes // len(array) for array in self.shared.state)

    def empty(self) -> bool:
        return False

    def fork(self, sequence: SequenceState) -> KVCache:
        self.slots.take_out(self)
        return self.fork(sequence)

    @property
    def offset(self) -> int:
        return self.shared.offset - self.before

    @offset.setter
    def offset(self, offset: int) -> None:
        if offset != self.offset:
            self.slots.take_out(self)
            self.offset = offset

    @property
    def start(self) -> int:
        return max(self.oldest, self.shared.start - self.before)

    @start.setter
    def start(self, start: int) -> None:
        if start != self.start:
            self.slots.take_out(self)
            self.start = start

    @property
    def state(self) -> list[mx.array]:
        self.slots.take_out(self)
        return self.state

    @state.setter
    def state(self, state: list[mx.array]) -> None:
        self.slots.take_out(self)
        self.state = state


def _slots_of(cache: Sequence[KVCache]) -> SharedSlots | None:
    """Where a row is, None if it has arrays of its own."""
    first, last = cache[0], cache[-1]
    if isinstance(first, SharedKVCache) and isinstance(last, SharedKVCache) and first.slots is last.slots:
        return first.slots
    for layer in cache:  # a call was broken off while they moved
        if isinstance(layer, SharedKVCache):
            layer.leave()
    return None


def _may_share(cache: Sequence[KVCache]) -> bool:
    """Whether it is a row that decodes for some time, has all that its next query sees, and is not packed."""
    first = cache[0]
    if type(first) is not KVCache or first.sequence.steps < SETTLED:
        return False
    return bool(first.state) and len(first.state[0]) == 1 and not first.lost


def _with_loose(groups: list[list[int]], loose: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """The groups of rows, to which loose rows come where lengths are alike; others make groups, also of one."""
    groups = list(groups)
    for row in sorted(loose, key=lengths.__getitem__):
        for rows in groups:
            length_of_all = [lengths[other] for other in (*rows, row)]
            if max(length_of_all) - min(length_of_all) <= LIKE:
                rows.append(row)
                break
        else:
            groups.append([row])
    return groups


def _rearranged(staying: Sequence[Sequence[KVCache]], leaving: Sequence[Sequence[KVCache]]) -> SharedSlots | None:
    """New arrays for the rows that stay, of one shared array or none before, and of its own for each that leaves.

    A row that would stay alone leaves too: then None. Layer by layer, so that not more than a layer exists twice.
    """
    if len(staying) == 1:
        staying, leaving = [], [*leaving, *staying]
    slots = SharedSlots(staying) if staying else None
    for layers in zip(*leaving, *staying, strict=True):
        former = {id(layer.shared): layer.shared for layer in layers if isinstance(layer, SharedKVCache)}
        for layer in layers[: len(leaving)]:
            if isinstance(layer, SharedKVCache):
                layer.leave()
        if slots is not None:
            slots.take_in(layers[len(leaving) :])
        for shared in former.values():
            shared.state = []
    return slots
