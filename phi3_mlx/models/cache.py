"""The key-value cache: keys and values of the tokens read so far, layer by layer, and what the layers share.

The layers of one cache share a `SequenceState`: the token ids read so far, so that a model can recompute the cache when
what is stored is no longer valid (a LongRoPE regime that changed, a window that was trimmed into).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import OptionError
from ..values import shown, whole

KV_BITS = (2, 3, 4, 6, 8)
KV_GROUP_SIZES = (32, 64)
RECOMPUTE_CHUNK = 512
_MOST_PIECES = 64  # arrays of ids, one a call, that are kept before they are joined


class SequenceState:
    """The token ids that a cache has read, the left padding of its rows and their LongRoPE regimes."""

    def __init__(self, left_padding: tuple[int, ...] | None = None, prompt_length: tuple[int, ...] | None = None):
        self.left_padding = left_padding
        self.prompt_length = prompt_length
        self.long: tuple[bool, ...] | None = None
        self.reader: object = None  # the run that it belongs to
        self.edits: tuple[Any, ...] = ()  # of the model's values, under which it was read (`hooks`)
        self.prompt = prompt_length  # tokens of each row that are the prompt's, where somebody said so
        self.stands_for: tuple[SequenceState, int] | None = None  # the row that is recomputed
        self.recompute_chunk = RECOMPUTE_CHUNK  # tokens recomputed at once
        self.wanted_from: int | None = None  # outputs are wanted from this position on, not only the prompt's last
        self.steps = 0  # calls of one token since the last of several
        self._pieces: list[mx.array] = []
        self._length = 0  # of all pieces
        self._prompt_read = 0  # tokens up to the last call of several, or the first call
        # Sent to the device once: positions of every layer's rotation start here.
        self.padding_array = None if left_padding is None else mx.array(left_padding)

    @property
    def ids(self) -> mx.array:
        """Token ids read, int32 (B, n)."""
        if len(self._pieces) > 1:
            self._keep(mx.concatenate(self._pieces, axis=1))
        return self._pieces[0]

    @property
    def kept(self) -> list[mx.array]:
        """The arrays to evaluate after a call that was interrupted."""
        return self._pieces

    def _keep(self, ids: mx.array) -> None:
        mx.async_eval(ids)  # queued, without waiting: another thread cannot compute this thread's lazy arrays
        self._pieces = [ids]

    def read(self, ids: mx.array, offset: int) -> None:
        """Append `ids` (B, L) after the first `offset` ids; any ids behind those were trimmed, and are forgotten."""
        self.steps = self.steps + 1 if ids.shape[1] == 1 else 0
        if offset < self._length:
            if offset:
                self._keep(self.ids[:, :offset])
            else:
                self._pieces = []
        if len(self._pieces) > _MOST_PIECES:
            self._keep(mx.concatenate(self._pieces, axis=1))
        if ids.shape[1] > 1 or not offset:
            self._prompt_read = offset + ids.shape[1]
        self._length = offset + ids.shape[1]  # first: a Ctrl-C in between leaves what the next call forgets
        self._pieces.append(ids)

    def prompt_of(self, row: int) -> int:
        """How many tokens of a row, without padding, are its prompt's: as declared, else those of calls of several."""
        if self.prompt is not None:
            return self.prompt[row if len(self.prompt) > 1 else 0]
        return self._prompt_read - (self.left_padding[row] if self.left_padding else 0)

    def lengths_after(self, total: int, batch: int) -> list[int]:
        """How many tokens, without padding, each of `batch` rows has once the cache has read `total` in all.

        Call it before they are read. A declared prompt counts in full from the beginning.
        """
        lengths = [total - padding for padding in self.left_padding or (0,) * batch]
        if self.prompt_length is None:
            return lengths
        declared = self.prompt_length * batch if len(self.prompt_length) == 1 else self.prompt_length
        if all(length >= n for length, n in zip(lengths, declared, strict=True)):
            self.prompt_length = None  # read in full: from here on the cache's own length counts
        return [max(length, n) for length, n in zip(lengths, declared, strict=True)]

    @property
    def expected(self) -> int:
        """Tokens that each row will have, padding included, once the prompts that were declared are read."""
        if self.prompt_length is None:
            return 0
        padding = self.left_padding or (0,) * len(self.prompt_length)
        return max(length + pad for length, pad in zip(self.prompt_length, padding, strict=False))

    def fork(self) -> SequenceState:
        """The same tokens, to be continued otherwise; no run has it yet."""
        other = copy.copy(self)
        other.reader, other._pieces = None, list(self._pieces)
        return other


@dataclass(frozen=True)
class KVBits:
    """How a cache packs keys and values: bits of each (2, 3, 4, 6 or 8), and how many numbers share a scale (32 or 64).

    Raises OptionError for others.
    """

    keys: int
    values: int
    group_size: int = 32

    def __post_init__(self) -> None:
        for bits in (self.keys, self.values):
            if bits not in KV_BITS:
                raise OptionError(f"kv_bits {bits} is not possible; choose {', '.join(map(str, KV_BITS))}")
        if self.group_size not in KV_GROUP_SIZES:
            raise OptionError(f"kv_group_size {self.group_size} is not possible; choose 32 or 64")

    def dividing(self, head_dim: int) -> KVBits:
        """The same bits, in groups that divide a head of this width: of 32 where these do not."""
        return KVBits(self.keys, self.values) if head_dim % self.group_size else self


class KVCache:
    """Keys and values of one layer, each (B, Hkv, slots, D).

    Without `window` every token keeps its slot. With it only the last `window - 1` do, because a query sees itself and
    the `window - 1` tokens before it. There is room for up to two `step`s more, so that old tokens are dropped in bulk,
    and `spare` older tokens stay, so that as many new ones can be trimmed again.
    """

    step = 256
    spare = 32
    bits: KVBits | None = None
    is_last = False  # of the model's layers

    def __init__(self, sequence: SequenceState | None = None, window: int | None = None):
        self.sequence = SequenceState() if sequence is None else sequence
        self.window = window
        self.state: list[mx.array] = []  # the arrays, slots along axis 2; none before the first token
        self.offset = 0  # tokens read
        self.start = 0  # position of the token in slot 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Append (B, Hkv, L, D) each; return all that the new queries may see, oldest first, as it is stored.

        B may be less than the arrays have: they are of the first rows.
        """
        new, length = self._stored(keys, values), keys.shape[2]
        used = self.offset - self.start
        end = used + length
        self._reserve(end, new)
        fills = length == self.state[0].shape[2]
        for array, part in zip(self.state, new, strict=True):
            # Where it fills all slots MLX would store the part itself: a view that keeps all of `qkv` in memory.
            array[: len(part), :, used:end] = mx.contiguous(part) if fills else part
        first = self.first_visible - self.start
        self.offset += length
        seen = [array[: len(keys), :, first:end] for array in self.state]
        if self.window is not None and end > self.window - 1 + self.spare + self.step:
            self._drop(end - (self.window - 1) - self.spare, end)
        return seen

    def _stored(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Keys and values in the form in which they are kept."""
        return [keys, values]

    @property
    def kept(self) -> list[mx.array]:
        """The arrays to evaluate before another thread goes on."""
        return self.state

    @property
    def tokens(self) -> list[mx.array]:
        """What `state` has of the tokens from `start` on, as views."""
        return [array[..., : self.offset - self.start, :] for array in self.state]

    def copy_tokens(self, first: int, last: int) -> list[mx.array]:
        """Lazy copies of the slots of the tokens at positions `first` to `last`, as in `state`."""
        return [mx.contiguous(array[..., first - self.start : last - self.start, :]) for array in self.tokens]

    def begin_with(self, runs: Sequence[Sequence[mx.array]], start: int) -> None:
        """Take copies of runs of tokens that another cache has read, the first of them at position `start`.

        A run is what `copy_tokens` gives. There is room for the prompt that is expected.
        """
        used = sum(run[0].shape[2] for run in runs)
        slots = used if self.window is not None else max(used, self.sequence.expected)
        slots = (slots // self.step + 1) * self.step
        state = [mx.concatenate([*parts, _empty(parts[0], slots - used)], axis=2) for parts in zip(*runs, strict=True)]
        mx.eval(state)
        self.state, self.start, self.offset = state, start, start + used

    @property
    def first_visible(self) -> int:
        """Position of the oldest token the next query may see."""
        return 0 if self.window is None else max(0, self.offset - (self.window - 1))

    def first_kept(self, offset: int) -> int:
        """Position of the oldest token that is of use after `offset` tokens: the window's first, or `spare` before."""
        return 0 if self.window is None else max(0, offset - (self.window - 1) - self.spare)

    @property
    def awaited(self) -> bool:
        """False for the last layer while more of the prompt is coming: nobody reads its output."""
        wanted = self.sequence.wanted_from
        return not self.is_last or self.offset >= (self.sequence.expected if wanted is None else wanted + 1)

    @property
    def lost(self) -> bool:
        """True if a trim went further back than the window's tokens: the cache must be recomputed."""
        return self.lost_at(self.offset)

    def lost_at(self, offset: int) -> bool:
        """Whether a trim to `offset` tokens goes further back than the window's tokens."""
        return self.window is not None and self.start > max(0, offset - (self.window - 1))

    def _reserve(self, slots: int, like: list[mx.array]) -> None:
        have = self.state[0].shape[2] if self.state else 0
        if slots <= have:
            return
        if self.window is None:  # room for the whole prompt: growing copies, and for a moment both copies exist
            slots = max(slots, self.sequence.expected)
        slots = -(-slots // self.step) * self.step
        if not have:
            self.state = [_empty(array, slots) for array in like]
            return
        state = [_extended(array, slots) for array in self.state]
        mx.eval(state)  # or MLX would copy all layers before it frees one
        self.state = state

    def _drop(self, first: int, end: int, more: int | None = None) -> None:
        """Keep slots `first:end` alone, with room for `more` tokens, by default a step of them."""
        more = self.step if more is None else more
        slots = -(-(end - first + more) // self.step) * self.step
        state = [_extended(array[..., first:end, :], slots) for array in self.state]
        mx.eval(state)  # or the old slots of every layer would stay until the end of the chunk
        self.state, self.start = state, self.start + first  # together: a Ctrl-C before leaves all as it was

    def shrink(self) -> None:
        """Free the slots after the last token if they are the larger part."""
        used = self.offset - self.start
        if not self.lost and self.state and self.state[0].shape[2] > 2 * (used + self.step):
            self._drop(0, used)

    def forget(self) -> None:
        """Allocate empty slots for the tokens read, for `write_row` to fill."""
        like, self.state = self.state, []
        self.start = self.first_visible
        self._reserve(max(self.offset - self.start, 1), like)

    def narrow(self) -> None:
        """Keep what the next query may see and nothing older: `write_row` would not overwrite that."""
        if self.first_visible > self.start:
            self._drop(self.first_visible - self.start, self.offset - self.start, more=1)

    def write_row(self, row: int, other: KVCache) -> None:
        """Overwrite one row with the newest tokens of a cache of one row and the same kind, aligned at the end."""
        end, other_end = self.offset - self.start, other.offset - other.start
        n = min(end, other_end)
        for array, part in zip(self.state, other.state, strict=True):
            array[row, :, end - n : end] = part[0, :, other_end - n : other_end]

    def fork(self, sequence: SequenceState) -> KVCache:
        """What was read, to be continued otherwise; `sequence` is the fork's. See `fork`."""
        other = copy.copy(self)
        other.sequence = sequence
        # Other objects of the same arrays: writing into slots gives an object another array.
        other.state = [copy.copy(array) for array in self.state]
        return other

    # What mlx-lm's loops ask of a cache, beside `state` (the arrays to evaluate) and `update_and_fetch`.

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    @property
    def freed_bytes(self) -> int:
        """What `let_go` frees at once."""
        return self.nbytes

    def let_go(self) -> None:
        """Let go of the arrays; nobody may ask for what they had."""
        self.state = []

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return not self.state

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens; returns how many were forgotten."""
        n = min(n, self.offset)
        self.offset -= n
        if n:
            self.sequence.prompt_length = None
        if self.offset == 0:
            self.state = []
            self.start = 0
        return n


def fork(cache: Sequence[KVCache]) -> list[KVCache]:
    """A second cache that has read the same; each goes its own way, is trimmed and recomputed as if it were alone.

    They share their arrays until one of them is written to, which then copies its own, so a fork takes no memory yet.
    """
    sequence = cache[0].sequence.fork()
    return [layer.fork(sequence) for layer in cache]


def _empty(like: mx.array, slots: int) -> mx.array:
    """Zeros (B, Hkv, slots, D) for an array like `like`."""
    return mx.zeros((*like.shape[:2], slots, like.shape[3]), like.dtype)


def _extended(array: mx.array, slots: int) -> mx.array:
    """The array with empty slots appended, `slots` in all."""
    return mx.concatenate([array, _empty(array, slots - array.shape[2])], axis=2)


class QuantizedKVCache(KVCache):
    """A `KVCache` that packs keys and values with `mx.quantize` as they arrive.

    Its arrays: codes, scales and biases of the keys, then of the values.
    """

    def __init__(self, bits: KVBits, sequence: SequenceState | None = None, window: int | None = None):
        super().__init__(sequence, window)
        self.bits: KVBits = bits

    def _stored(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        group_size = self.bits.group_size
        return [*mx.quantize(keys, group_size, self.bits.keys), *mx.quantize(values, group_size, self.bits.values)]


def take_back(cache: Sequence[KVCache], offset: int) -> None:
    """Forget what a call that was broken off has read beyond `offset`."""
    for layer in cache:
        layer.trim(layer.offset - offset)


def kv_bytes(config: Config, length: int, bits: KVBits | None, itemsize: int) -> int:
    """Bytes that a layer's cache has of one row of `length` tokens, with `itemsize` bytes a number.

    Keys and values (Hkv, slots, D) each, slots by the `step`; behind a window as many as `KVCache` keeps at most.
    Packed: their codes, and a scale and a bias for every group.
    """
    slots = length
    if config.sliding_window is not None:
        slots = min(length, config.sliding_window - 1 + KVCache.spare + 2 * KVCache.step)
    slots = -(-slots // KVCache.step) * KVCache.step
    numbers = slots * config.num_key_value_heads * config.head_dim  # of the keys, and as many of the values
    if bits is None:
        return 2 * numbers * itemsize
    codes = numbers * (bits.keys + bits.values) // 8
    return codes + 2 * 2 * numbers // bits.group_size * itemsize


def make_kv_bits(kv_bits: int | Sequence[int] | None, kv_group_size: int | None = None) -> KVBits | None:
    """How to pack a cache: `kv_bits` of keys and values alike or of each, None for not at all. Raises OptionError."""
    if kv_bits is None:
        if kv_group_size is not None:
            raise OptionError(f"kv_group_size {shown(kv_group_size)} has no effect without kv_bits=BITS; leave it out")
        return None
    each = kv_bits if isinstance(kv_bits, tuple | list) else (kv_bits, kv_bits)
    if len(each) != 2:
        raise OptionError(f"kv_bits has {len(each)} numbers; give one such as 4, or (8, 4) of keys and values")
    keys, values = (whole(bits, "kv_bits") for bits in each)
    return (
        KVBits(keys, values) if kv_group_size is None else KVBits(keys, values, whole(kv_group_size, "kv_group_size"))
    )
