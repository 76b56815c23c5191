"""Keys and values of what was read, and what all layers share about it.

The layers of one cache share a `Sequence`: the token ids read so far, so that a model can read them again when
what is stored no longer serves (a LongRoPE regime that changed, a window that was trimmed into).
"""

from __future__ import annotations

import mlx.core as mx

_PIECES = 64  # ids arrive one array a call; join them this often


class Sequence:
    """The token ids a cache has read, its rows' left padding and LongRoPE regimes."""

    def __init__(self, left_padding: tuple[int, ...] | None = None, prompt_length: tuple[int, ...] | None = None):
        self.left_padding = left_padding
        self.prompt_length = prompt_length
        self.long: tuple[bool, ...] | None = None
        self._pieces: list[mx.array] = []
        # Sent to the device once: positions of every layer's rotation start here.
        self.padding_array = None if left_padding is None else mx.array(left_padding)

    @property
    def ids(self) -> mx.array:
        """Token ids read, int32 (B, n)."""
        if len(self._pieces) > 1:
            self._pieces = [mx.concatenate(self._pieces, axis=1)]
        return self._pieces[0]

    def read(self, ids: mx.array, offset: int) -> None:
        """Note that `ids` (B, L) follow the first `offset` ids; what was trimmed since is forgotten."""
        length = sum(piece.shape[1] for piece in self._pieces)
        if offset < length:
            self._pieces = [self.ids[:, :offset]] if offset else []
        if len(self._pieces) > _PIECES:
            # All but the newest are computed already, so joining them waits for nothing.
            joined = mx.concatenate(self._pieces[:-2], axis=1)
            mx.eval(joined)
            self._pieces = [joined, *self._pieces[-2:]]
        self._pieces.append(ids.astype(mx.int32))

    def select(self, rows: mx.array) -> None:
        """Keep only these rows of a batch, in this order."""
        order: list[int] = rows.tolist()  # type: ignore[assignment]
        if self._pieces:
            self._pieces = [self.ids[rows]]
        if self.left_padding is not None:
            self.left_padding = tuple(self.left_padding[i] for i in order)
            self.padding_array = mx.array(self.left_padding)
        if self.prompt_length is not None:
            self.prompt_length = tuple(self.prompt_length[i] for i in order)
        if self.long is not None:
            self.long = tuple(self.long[i] for i in order)


class KVCache:
    """Keys and values of one layer, each (B, Hkv, slots, D).

    Without `window` every token keeps its slot. With it only the last `window - 1` do (a query sees itself and
    `window - 1` before it), with room for at most two `step`s more so that old ones are dropped in bulk.
    """

    step = 256

    def __init__(self, sequence: Sequence | None = None, window: int | None = None):
        self.sequence = Sequence() if sequence is None else sequence
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0  # tokens read
        self.start = 0  # position of the token in slot 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, Hkv, L, D) each; return all that the new queries may see, oldest first."""
        used, end = self.offset - self.start, self.offset - self.start + keys.shape[2]
        self._reserve(end, keys, values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[..., used:end, :] = keys
        self.values[..., used:end, :] = values
        first = self.first_visible - self.start
        self.offset += keys.shape[2]
        seen = self.keys[..., first:end, :], self.values[..., first:end, :]
        if self.window is not None and end > self.window - 1 + self.step:
            self._drop(end - (self.window - 1), end)
        return seen

    @property
    def first_visible(self) -> int:
        """Position of the oldest token the next query may see."""
        return 0 if self.window is None else max(0, self.offset - (self.window - 1))

    @property
    def lost(self) -> bool:
        """True if a trim reached behind what the window kept: the ids must be read again."""
        return self.start > self.first_visible

    def _reserve(self, slots: int, keys: mx.array, values: mx.array) -> None:
        have = 0 if self.keys is None else self.keys.shape[2]
        if slots <= have:
            return
        more = -(-(slots - have) // self.step) * self.step
        batch, heads = keys.shape[:2]
        new_keys = mx.zeros((batch, heads, more, keys.shape[3]), keys.dtype)
        new_values = mx.zeros((batch, heads, more, values.shape[3]), values.dtype)
        if self.keys is None or self.values is None:
            self.keys, self.values = new_keys, new_values
        else:
            self.keys = mx.concatenate([self.keys, new_keys], axis=2)
            self.values = mx.concatenate([self.values, new_values], axis=2)

    def _drop(self, first: int, end: int) -> None:
        """Keep slots `first:end` alone, with room for a step more."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[..., first:end, :], self.values[..., first:end, :]
        self.keys = self.values = None
        self.start += first
        self._reserve(end - first + self.step, keys, values)
        self.keys[..., : end - first, :] = keys  # type: ignore[index]
        self.values[..., : end - first, :] = values  # type: ignore[index]

    def forget(self) -> None:
        """Make the slots that the tokens read need, empty, for `write_row` to fill."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        self.keys = self.values = None
        self.start = self.first_visible
        self._reserve(max(self.offset - self.start, 1), keys, values)

    def narrow(self) -> None:
        """Keep what the next query may see and nothing older, which `write_row` would not renew."""
        if self.first_visible > self.start:
            self._drop(self.first_visible - self.start, self.offset - self.start)

    def write_row(self, row: int, other: KVCache) -> None:
        """Overwrite one row with the newest tokens of a cache of one row, aligned at the end."""
        assert self.keys is not None
        assert self.values is not None
        assert other.keys is not None
        assert other.values is not None
        end, other_end = self.offset - self.start, other.offset - other.start
        n = min(end, other_end)
        self.keys[row, :, end - n : end] = other.keys[0, :, other_end - n : other_end]
        self.values[row, :, end - n : end] = other.values[0, :, other_end - n : other_end]

    def select(self, rows: mx.array) -> None:
        """Keep only these rows of a batch. The shared `sequence` is the caller's to select, once."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    # What mlx-lm's loops ask of a cache.

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens; returns how many were forgotten."""
        n = min(n, self.offset)
        self.offset -= n
        if n:
            self.sequence.prompt_length = None
        if self.offset == 0:
            self.keys = self.values = None
            self.start = 0
        return n
