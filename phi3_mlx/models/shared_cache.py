"""A layer of the cache of a row that shares its arrays with others, and a layer of all of them."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from .cache import KVCache, SequenceState

# What a layer has while it is a `SharedKVCache`; the first two keep the others' arrays alive.
_OF_SHARED = ("slots", "shared", "place", "before", "oldest", "end")


class Sharing(Protocol):
    """The rows that share arrays: how many they are, and how the row of a layer gets arrays of its own."""

    @property
    def size(self) -> int: ...

    def take_out(self, layer: SharedKVCache) -> None: ...


class SharedLayer(KVCache):
    """A layer of all rows that share arrays. Nobody sees what lies before the first of them begins."""

    @property
    def first_visible(self) -> int:
        return max(super().first_visible, min(self.sequence.left_padding or (0,)))


class SharedKVCache(KVCache):
    """A layer of a row whose keys and values lie in `shared`, at `place`, beside those of other rows."""

    slots: Sharing
    shared: KVCache
    place: int
    before: int  # what to add to a position of the row for that in `shared`
    oldest: int  # position of the oldest token that came in
    end: int | None  # tokens read, of a row that rests where it is while others go on

    @staticmethod
    def take_over(layer: KVCache, slots: Sharing, shared: KVCache, place: int) -> None:
        """Let a layer have its tokens in `shared`, where they were copied to, and no arrays of its own."""
        before, oldest = shared.offset - layer.offset, layer.start
        vars(layer).update(slots=slots, shared=shared, place=place, before=before, oldest=oldest, end=None)
        layer.__class__ = SharedKVCache  # a Ctrl-C before leaves it as it was
        vars(layer).pop("state", None)

    def leave(self) -> None:
        """Become a plain cache again, with a copy of the row's tokens."""
        plain = KVCache(self.sequence, self.window)
        plain.begin_with([self.tokens], self.start)
        self._be_plain(plain)

    def _be_plain(self, plain: KVCache) -> None:
        vars(self).update(state=plain.state, start=plain.start, offset=plain.offset)
        self.__class__ = KVCache  # type: ignore[assignment]
        for name in _OF_SHARED:
            vars(self).pop(name)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        self.slots.take_out(self)  # a copy is of a row alone
        return self.__reduce_ex__(protocol)

    @property
    def tokens(self) -> list[mx.array]:
        first, end = (position + self.before - self.shared.start for position in (self.start, self.offset))
        return [array[self.place : self.place + 1, :, first:end] for array in self.shared.state]

    @property
    def kept(self) -> list[mx.array]:
        return self.shared.state

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.shared.state) // self.slots.size

    @property
    def freed_bytes(self) -> int:
        return 0

    def let_go(self) -> None:
        plain = KVCache(self.sequence, self.window)
        plain.offset, plain.start = self.offset, self.start
        self._be_plain(plain)

    def empty(self) -> bool:
        return False

    def fork(self, sequence: SequenceState) -> KVCache:
        self.slots.take_out(self)
        return self.fork(sequence)

    @property
    def offset(self) -> int:
        return self.shared.offset - self.before if self.end is None else self.end

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


def slots_for(layer: KVCache, length: int) -> int:
    """How many slots a layer like this has once it has read `length` tokens, with room for one more at least."""
    return ((length - layer.first_kept(length)) // layer.step + 1) * layer.step


def write_row(layer: KVCache, shared: KVCache, place: int) -> None:
    """Copy the tokens of a row's layer to a place of `shared`, their last one behind what was written there last."""
    used = shared.offset - shared.start
    within = isinstance(layer, SharedKVCache) and layer.shared is shared
    for array, tokens in zip(shared.state, layer.tokens, strict=True):
        newest = tokens[0, :, -used:]
        if within:
            newest = mx.contiguous(newest)
            mx.eval(newest)  # as a view of the same array it would make MLX copy all of that
        array[place, :, used - newest.shape[1] : used] = newest
