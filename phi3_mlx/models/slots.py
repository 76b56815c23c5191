"""Rows of like length keep their keys and values in arrays that they share, so that one call attends for all of them.

    row 0   | a b c d e f g . . |
    row 1   | - - - p q r s . . |      -: before the row begins, never seen    .: room for the next tokens
    empty   | - - - - - - - . . |      the place of a row that has ended, for the next one that comes

Rows that decode a token each write it at the same slot, and one call of attention in a layer, with a mask for what
lies before a row begins, serves them all. Keys are rotated before they are stored, so positions and LongRoPE's regimes
stay each row's own.

Rows stand in the first places, so one call takes them as a view. Who comes is copied to the first empty place; where a
row has ended the last one takes its place. Only where none is empty, where a row is longer than what was written so
far, or where the slots are full, all rows move to other arrays. Empty places hold memory, which `give_back`
frees.

A row that shares arrays keeps its list of caches, whose layers are `SharedKVCache`s meanwhile. Whoever asks one of
them for its arrays, or trims it, takes the row out: its layers are plain `KVCache`s again, as if it had been alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .attention import Mask, make_mask
from .cache import KVCache, SequenceState
from .shared_cache import SharedKVCache, SharedLayer, slots_for, write_row

# How much longer than the shortest of the rows that share arrays the longest may be: what lies before a row begins
# costs memory, and time on the CPU.
LIKE = KVCache.step
# Tokens that a row must have brought one by one: to come costs a copy of the row, which does not pay for an answer of a
# few words, nor for one whose form dictates several tokens at once now and then.
SETTLED = 8


@dataclass(frozen=True)
class Unit:
    """What one call of attention serves: `rows`, of one token each, the `layers` of their cache, and the mask.

    `resting`: where there are other rows between them, whose tokens are not asked for. The first array has for each
    place the row of the unit that stands there, or any, the second the place of each row.
    """

    rows: Sequence[int]
    layers: Sequence[KVCache]
    mask: Mask = None
    resting: tuple[mx.array, mx.array] | None = None


def units_of(caches: Sequence[Sequence[KVCache]], *, share: bool) -> list[Unit]:
    """How rows with these caches are attended to, a token of each. With `share` those of like length share arrays.

    Here rows are brought together, and leave those that are not among them or of like length any more.
    """
    slots = [_slots_of(cache) for cache in caches]
    if slots and slots[0] is not None and slots == [slots[0]] * slots[0].size and slots[0].goes_on:
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
        present = [caches[row] for row in rows]
        arranged = _arranged(slots[rows[0]], present)
        units.append(Unit(rows, present[0]) if arranged is None else arranged.unit(caches, rows))
    return units


def take_out(caches: Sequence[Sequence[KVCache]]) -> None:
    """Give rows arrays of their own, where they share some with others."""
    leaving: dict[SharedSlots, list[Sequence[KVCache]]] = {}
    for cache in caches:
        if (shared := _slots_of(cache)) is not None:
            leaving.setdefault(shared, []).append(cache)
    for shared, rows in leaving.items():
        _rearranged(shared.others(rows), rows)


def unused_bytes(caches: Sequence[Sequence[KVCache]]) -> int:
    """What the arrays that these rows share hold beyond what the rows need."""
    return sum(shared.unused_bytes for shared in {_slots_of(cache) for cache in caches} if shared is not None)


def give_back(caches: Sequence[Sequence[KVCache]]) -> None:
    """Free that: all rows move to arrays that fit."""
    for shared in {_slots_of(cache) for cache in caches}:
        if shared is not None:
            _rearranged(shared.others([]), [])


class SharedSlots:
    """Arrays that some rows share: `layers`, each a cache with a `place` for each row, and perhaps empty ones behind.

    `whole`: no call was broken off while rows moved; else each layer of a row still knows where its tokens are.
    """

    def __init__(self, caches: Sequence[Sequence[KVCache]]):
        self.places = len(caches)
        self.layers: list[KVCache] = []
        self.whole = False
        self._rests = False
        self._longest = max(cache[0].offset for cache in caches)
        self._sequence = SequenceState()
        # Weakly: rows keep the arrays alive, so who lets go of all rows frees them.
        self._rows = [[weakref.ref(layer) for layer in cache] for cache in caches]

    @property
    def size(self) -> int:
        """Rows that it had when it was looked at last."""
        return len(self._rows)

    def take_in(self, layers: Sequence[KVCache]) -> None:
        """Copy the next layer of all rows, which is theirs from now on."""
        cache = SharedLayer(self._sequence, layers[0].window)
        cache.offset = self._longest
        cache.start = cache.first_kept(cache.offset)
        slots, like = slots_for(cache, cache.offset), layers[0].tokens
        cache.state = [mx.zeros((self.places, array.shape[1], slots, array.shape[3]), array.dtype) for array in like]
        for place, layer in enumerate(layers):
            write_row(layer, cache, place)
        mx.eval(cache.state)  # or all layers would exist twice
        for place, layer in enumerate(layers):
            SharedKVCache.take_over(layer, self, cache, place)
        self.layers.append(cache)

    def let_rest(self, rows: Sequence[Sequence[SharedKVCache]]) -> None:
        """Go on without some rows, whose tokens stay where they are."""
        self._rests = bool(rows)
        for row in rows:
            for layer in row:
                layer.end = layer.offset

    def finish(self) -> None:
        """Note that all rows have moved."""
        first_layers = [row[0]() for row in self._rows]
        self._sequence.left_padding = tuple(layer.before for layer in first_layers if isinstance(layer, SharedKVCache))
        self.whole = True

    @property
    def goes_on(self) -> bool:
        """Whether all its rows may read a further token where they are."""
        return not self._rests and self.has_room_for([])

    def has_room_for(self, caches: Sequence[Sequence[KVCache]]) -> bool:
        """Whether these rows may come without others moving, and all write a further token."""
        first = self.layers[0]
        used = first.offset - first.start
        enough = self.places // 2 <= self.size + len(caches) <= self.places
        return enough and used < first.state[0].shape[2] and all(cache[0].offset <= first.offset for cache in caches)

    def come(self, cache: Sequence[KVCache]) -> None:
        """Let a row come to the first empty place, of which there must be one."""
        self.whole = False
        self._rows.append([weakref.ref(layer) for layer in cache])
        self._move(cache, self.size - 1)
        self.finish()

    def close_up(self) -> None:
        """Let the last rows take the places of those that have ended."""
        place = 0
        while place < len(self._rows):
            if self._held(self._rows[place]):
                place += 1
                continue
            self.whole = False
            last = self._rows.pop()
            if place < len(self._rows):
                self._rows[place] = last
                self._move(self._held(last), place)
        self.finish()

    def _move(self, row: Sequence[KVCache], place: int) -> None:
        for layer, cache in zip(row, self.layers, strict=False):  # no layers of a row that has ended too
            write_row(layer, cache, place)
            mx.eval(cache.state)
            SharedKVCache.take_over(layer, self, cache, place)

    def unit(self, caches: Sequence[Sequence[KVCache]], rows: Sequence[int]) -> Unit:
        """The unit of all its rows but those that rest, which are `rows` of those with these caches."""
        row_at = {caches[row][0].place: row for row in rows}  # type: ignore[attr-defined]
        places = sorted(row_at)
        resting = None
        if len(places) < self.size:
            standing = [places.index(place) if place in row_at else 0 for place in range(self.size)]
            resting = mx.array(standing), mx.array(places)
        mask = make_mask(1, self.layers[0].window, self.layers[0])
        return Unit([row_at[place] for place in places], self.layers, mask, resting)

    def others(self, caches: Sequence[Sequence[KVCache]]) -> list[list[SharedKVCache]]:
        """Its rows but those with these caches; who was let go of is none of them."""
        there = {id(layer) for cache in caches for layer in cache}
        others: list[list[SharedKVCache]] = []
        for row in self._rows:
            held = self._held(row)
            if len(held) == len(row) and id(held[0]) not in there:
                others.append(held)
            elif len(held) < len(row):  # a call was broken off while they moved
                for layer in held:
                    layer.leave()
        return others

    def _held(self, row: Sequence[weakref.ref[KVCache]]) -> list[SharedKVCache]:
        """The layers of a row that are here; none of one that has ended."""
        return [layer for ref in row if isinstance(layer := ref(), SharedKVCache) and layer.slots is self]

    @property
    def unused_bytes(self) -> int:
        """Bytes beyond those of arrays that fit its rows."""
        rows = self.others([])
        fitting = len(rows) * slots_for(self.layers[0], max(row[0].offset for row in rows))
        there = self.places * self.layers[0].state[0].shape[2]
        return sum(array.nbytes // there * max(there - fitting, 0) for layer in self.layers for array in layer.state)

    def take_out(self, layer: SharedKVCache) -> None:
        """Give the row of a layer arrays of its own."""
        rows = self.others([])
        leaving = [row for row in rows if any(layer is other for other in row)]
        _rearranged([row for row in rows if row not in leaving], leaving)


def _slots_of(cache: Sequence[KVCache]) -> SharedSlots | None:
    """Where a row is, None if it has arrays of its own."""
    first, last = cache[0], cache[-1]
    both = isinstance(first, SharedKVCache) and isinstance(last, SharedKVCache) and first.slots is last.slots
    if both and first.slots.whole:  # type: ignore[attr-defined]
        return first.slots  # type: ignore[attr-defined]
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


def _arranged(former: SharedSlots | None, present: Sequence[Sequence[KVCache]]) -> SharedSlots | None:
    """Arrays of these rows, of which the first were in `former`; None for a row that is alone.

    Others that were in `former` rest where they are for one step: most have ended, and are let go of then.
    """
    if former is None:
        return _rearranged(present, [])
    others = former.others(present)
    former.close_up()
    newcomers = [cache for cache in present if _slots_of(cache) is not former]
    if len(present) == 1 or not former.has_room_for(newcomers) or any(map(_rests, (*others, *present))):
        return _rearranged(present, others)
    for cache in newcomers:
        former.come(cache)
    former.let_rest(others)
    return former


def _rests(cache: Sequence[KVCache]) -> bool:
    """Whether other rows went on without this one."""
    return isinstance(cache[0], SharedKVCache) and cache[0].end is not None


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
    if slots is not None:
        slots.finish()
    return slots
