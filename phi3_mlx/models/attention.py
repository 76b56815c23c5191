"""Which keys a query may see, and the attention call all models share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from .cache import KVBits, KVCache, kv_bytes
from .linear import dequantizing_bytes
from .pass_shape import PassShape

# Limits of what one attention call writes to memory beside its result, in numbers.
SCORES = 1 << 24  # of a few queries on a GPU, and of block-sparse tiles anywhere: 64 MB of float32
DEQUANTIZED = 1 << 24  # keys, and as many values, of a packed cache on a GPU; on CUDA `_CUDA` times as many
_CUDA = 8  # a server's GPU has room for it, and with a head or two only a few of its processors had work
BLOCK = 1 << 20  # queries x keys on the CPU, where MLX has no fused kernel: 4 MB of float32, which stay near
LONG = 1024  # slots of a packed cache from which on the CPU reads one head at a time
_FEW = 32  # queries at most that read a quantized cache directly
_ROWS, _KEYS = 512, 1024  # of a block: queries at most, keys at least
_HIDDEN = float(np.finfo(np.float32).min)  # the score of a key that a query does not see; finite, see `_over_blocks`

# Bytes of a score of a block, by the bytes of a number: scores and weights in float32, and what is beside them where
# the products before and after are in 16 bits.
_SCORE_BYTES = {4: 8, 2: 14}

Mask = mx.array | str | None
Compute = Callable[[mx.array | list[mx.array]], None]


def attend(q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None, scale: float, mask: Mask) -> mx.array:
    """Softmax attention; q (B, H, L, D), k and v (B, Hkv, L, D) -> (B, L, H * D). Softmax in float32."""
    seen = [k, v] if cache is None else cache.update_and_fetch(k, v)
    bits = None if cache is None else cache.bits
    batch, heads, length, _ = q.shape
    numbers = batch * heads * length * seen[0].shape[2]
    # Computed before more is asked for; not without a cache: this may be training, whose graph is computed as a whole.
    compute = mx.eval if cache is not None and cache.awaited else _later
    if bits is not None and length <= _FEW and not on_cuda():
        out = _attend_packed(q, seen, bits, scale, mask)
    elif not fused_attention() and (bits is not None or (length > _FEW and numbers > BLOCK)):
        # On the CPU MLX makes room for ten operations ahead, so each block is computed before the next is asked for.
        out = _attend_in_blocks(q, seen, bits, scale, mask, compute)
    elif bits is not None:
        out = _attend_some_heads(q, seen, bits, scale, mask, compute)
    else:
        if length == 1 and cache is not None and cache.window is not None and on_cuda():
            # MLX's CUDA kernel for one query goes back to the array that a part was cut from, and to its first slot.
            seen = [mx.contiguous(array) for array in seen]
        out = mx.fast.scaled_dot_product_attention(q, seen[0], seen[1], scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def attention_bytes(shape: PassShape, keys: int) -> int:
    """Bytes that a call of `attend` writes beside its result, where the queries of `shape` see `keys` keys of a row."""
    if shape.fused:
        return _fused_bytes(shape, keys) if shape.bits is None else _some_heads_bytes(shape, keys)
    written = unblocked_bytes(shape, keys)
    if attends_in_blocks(shape, keys):
        written = max(written, _block_bytes(shape, keys))
    return written + (shape.tokens * keys if shape.is_masked(keys) else 0)  # a mask has a byte each


def _fused_bytes(shape: PassShape, keys: int) -> int:
    """Of MLX's own kernel: nothing; on CUDA the scores (B, H, L, S) of a chunk behind others, not of the first.

    So it was measured on an H200 (bench/LOG.md, 2026-11-26).
    """
    behind = on_cuda() and 1 < shape.queries < keys
    return shape.config.num_attention_heads * shape.tokens * keys * shape.itemsize if behind else 0


def unblocked_bytes(shape: PassShape, keys: int) -> int:
    """Of MLX's own kernel on the CPU: scores (B, H, L, S), up to as many as are computed without blocks.

    They are in the type of computation, and there twice where a mask has hidden some.
    """
    if shape.bits:
        return 0
    a_key = shape.config.num_attention_heads * shape.tokens
    keys = min(keys, BLOCK // a_key // shape.queries * shape.queries)  # chunk after chunk
    return shape.itemsize * a_key * keys * (2 if shape.is_masked(keys) else 1)


def fused_attention() -> bool:
    """Whether MLX's attention keeps its scores in registers; on the CPU it writes all of them to memory."""
    return mx.default_device().type == mx.DeviceType.gpu


def on_cuda() -> bool:
    """Whether this is CUDA, whose packed products know no heads of 96 and no arrays that were cut from others."""
    return fused_attention() and not mx.metal.is_available()


def dequantized_at_once() -> int:
    """How many keys, and as many values, of a packed cache are unpacked at once on this GPU."""
    return DEQUANTIZED * (_CUDA if on_cuda() else 1)


def _attend_packed(q: mx.array, seen: list[mx.array], bits: KVBits, scale: float, mask: Mask) -> mx.array:
    """A few queries against packed keys and values, which are read as they are, some heads at a time."""
    batch, heads, length, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    q = (q * scale).reshape(batch, kv_heads, -1, dim)  # (B, Hkv, G * L, D)
    if isinstance(mask, str):
        mask = mx.arange(slots) <= mx.arange(slots - length, slots)[:, None]  # (L, S)
    parts: list[mx.array] = []
    at_once = heads_at_once(batch * heads // kv_heads * length, slots, fused_attention())
    for head in range(0, kv_heads, at_once):
        cached = seen if at_once >= kv_heads else [array[:, head : head + at_once] for array in seen]
        queries = q[:, head : head + at_once]
        if parts:
            (queries,) = mx.depends([queries], parts[-1:])
        scores = scores_of(queries, cached[:3], bits).astype(mx.float32)  # (B, H, G * L, S)
        if mask is not None:
            apart = mx.unflatten(scores, 2, (-1, length))
            scores = mx.where(mask if mask.ndim == 2 else mask[:, :, None], apart, -mx.inf).flatten(2, 3)
        parts.append(weighted(mx.softmax(scores, axis=-1).astype(q.dtype), cached[3:], bits))
    return mx.concatenate(parts, axis=1).reshape(batch, heads, length, dim)


def heads_at_once(queries: int, slots: int, fused: bool) -> int:
    """How many key heads a few queries of each read at once in a packed cache.

    MLX's CPU backend copies arrays that are not in one piece; the slots in use are, of a single head.
    """
    return 1 if slots >= LONG and not fused else max(1, SCORES // (queries * slots))


def decoding_bytes(shape: PassShape, step: int) -> int:
    """Bytes that attention writes while `step` tokens of all rows are generated, or drafted and verified, at once.

    Their scores (H, step, S), in float32, of a packed cache also in the type of computation, of a call's heads.
    """
    keys, kv_heads = shape.keys, shape.config.num_key_value_heads
    queries = step * (shape.config.num_attention_heads // kv_heads)  # of a key head
    if shape.bits is None:
        return 0 if shape.fused else 4 * queries * kv_heads * keys
    if shape.fused and on_cuda():
        return _some_heads_bytes(shape, keys)
    return (4 + shape.itemsize) * queries * min(kv_heads, heads_at_once(queries, keys, shape.fused)) * keys


def scores_of(q: mx.array, keys: list[mx.array], bits: KVBits | None) -> mx.array:
    """q (..., L, D) with keys (..., S, D) as a cache stores them -> (..., L, S)."""
    if bits is None:
        return q @ keys[0].swapaxes(-1, -2)
    k, scales, biases = keys
    if on_cuda():
        k = mx.dequantize(k, scales, biases, group_size=bits.group_size, bits=bits.keys)
        return q @ k.swapaxes(-1, -2)
    return mx.quantized_matmul(q, k, scales, biases, transpose=True, group_size=bits.group_size, bits=bits.keys)


def weighted(weights: mx.array, values: list[mx.array], bits: KVBits | None) -> mx.array:
    """weights (..., L, S) of values (..., S, D) as a cache stores them -> (..., L, D)."""
    if bits is None:
        return weights @ values[0]
    v, scales, biases = values
    if on_cuda():
        return weights @ mx.dequantize(v, scales, biases, group_size=bits.group_size, bits=bits.values)
    return mx.quantized_matmul(
        weights, v, scales, biases, transpose=False, group_size=bits.group_size, bits=bits.values
    )


def _attend_some_heads(
    q: mx.array, seen: list[mx.array], bits: KVBits, scale: float, mask: Mask, compute: Compute
) -> mx.array:
    """MLX's fused attention over a packed cache, of which some heads are unpacked at a time.

    Where they are many they are computed before others are unpacked: a GPU frees nothing that is still in its
    queue of many operations.
    """
    batch, heads, _, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    group, at_once = heads // kv_heads, max(1, dequantized_at_once() // (batch * slots * dim))
    wait = compute if batch * kv_heads * slots * dim > DEQUANTIZED else _later
    parts: list[mx.array] = []
    for head in range(0, kv_heads, at_once):
        cached = [array[:, head : head + at_once] for array in seen]
        if parts:
            cached = mx.depends(cached, parts[-1:])
        k, v = dequantize_kv(cached, bits)
        queries = q[:, head * group : (head + at_once) * group]
        parts.append(mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=mask))
        wait(parts[-1])
    return mx.concatenate(parts, axis=1)


def _some_heads_bytes(shape: PassShape, keys: int) -> int:
    """Bytes of `_attend_some_heads`: heads dequantized, keys and values (B, heads, S, D), from a copy of their codes.

    A part of an array is not in one piece.
    """
    head, kv_heads = shape.rows * keys * shape.config.head_dim, shape.config.num_key_value_heads
    numbers = min(kv_heads * head, max(head, dequantized_at_once()))
    packed = shape.rows * kv_bytes(shape.config, keys, shape.bits, shape.itemsize)
    return 2 * numbers * shape.itemsize + packed * numbers // (kv_heads * head)


def block_of(group: int) -> tuple[int, int]:
    """What a block has on the CPU: at most this many queries, each in a `group` of heads, and keys of all key heads."""
    rows = max(1, min(_ROWS, BLOCK // (group * _KEYS)))
    return rows, max(1, BLOCK // (group * rows))


def _attend_in_blocks(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, mask: Mask, compute: Compute
) -> mx.array:
    """Some heads and queries at a time, over block after block of the keys: memory does not grow with their number.

    Sums and results of the blocks so far are rescaled when a larger score appears (arXiv 2112.05682). Weights are
    powers of 2 of scores times log2(e): here MLX's `power` takes less than half the time of its `exp`.
    """
    batch, heads, length, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    group = heads // kv_heads
    rows, keys = block_of(group)
    at_once = max(1, keys // slots)
    parts: list[mx.array] = []
    for b, head in itertools.product(range(batch), range(0, kv_heads, at_once)):
        tiles: list[mx.array] = []
        for first in range(0, length, rows):
            last = min(first + rows, length)
            # The last of these queries sees no further.
            cached = [array[b : b + 1, head : head + at_once, : slots - (length - last)] for array in seen]
            if before := tiles or parts:  # MLX would else be free to compute all of them at once
                cached = mx.depends(cached, before[-1:])
            queries = q[b : b + 1, head * group : (head + at_once) * group, first:last] * (scale * math.log2(math.e))
            visible = partial(_visible, mask, b, slice(first, last), slots - length)
            tile = _over_blocks(
                queries.reshape(1, -1, group * (last - first), dim), cached, bits, visible, keys, compute
            )
            tiles.append(tile.astype(q.dtype).reshape(1, -1, last - first, dim))
        parts.append(mx.concatenate(tiles, axis=2))
    return mx.concatenate(parts, axis=1).reshape(q.shape)


def attends_in_blocks(shape: PassShape, keys: int) -> bool:
    """Whether a pass is computed by `_attend_in_blocks`, each block before the next is asked for."""
    scores = shape.config.num_attention_heads * shape.tokens * keys
    return not shape.fused and (shape.bits is not None or scores > BLOCK)


def _block_bytes(shape: PassShape, keys: int) -> int:
    """Bytes of a block of `_over_blocks`: dequantized keys, values beside them, or scores beside both.

    Scores (group, L, slots), keys and values (slots, D) each, with the slots of all key heads.
    """
    group = shape.config.num_attention_heads // shape.config.num_key_value_heads
    rows, slots = block_of(group)
    rows, slots = min(rows, shape.queries), min(slots, shape.config.num_key_value_heads * keys)
    numbers = slots * shape.config.head_dim if shape.bits else 0  # of the keys; those of others lie in the cache
    of_key, of_value = kv_dequantizing_bytes(shape)
    scored = _SCORE_BYTES[shape.itemsize] * group * rows * slots
    return max(numbers * of_key, numbers * (shape.itemsize + of_value), 2 * numbers * shape.itemsize + scored)


def kv_dequantizing_bytes(shape: PassShape) -> tuple[int, int]:
    """Bytes for a number of packed keys, and one of values, while they are dequantized on the CPU."""
    if shape.bits is None or shape.fused:
        return shape.itemsize, shape.itemsize
    return dequantizing_bytes(shape.bits.keys, shape.itemsize), dequantizing_bytes(shape.bits.values, shape.itemsize)


def _over_blocks(
    queries: mx.array,
    seen: list[mx.array],
    bits: KVBits | None,
    visible: Callable[[slice], mx.array | None],
    keys: int,
    compute: Compute,
) -> mx.array:
    """Attention of queries (1, H, G * L, D) to the keys and values of H heads, `keys` keys at a time; float32."""
    state: list[mx.array] = []
    for first in range(0, seen[0].shape[2], keys):
        block = slice(first, min(first + keys, seen[0].shape[2]))
        cached = [array[:, :, block] for array in seen]
        if state:
            cached = mx.depends(cached, state[-1:])
        k, v = (cached[0], cached[1]) if bits is None else dequantize_kv(cached, bits, compute)
        scores = (queries @ k.swapaxes(-1, -2)).astype(mx.float32)
        mask = visible(block)
        if mask is not None:
            # Of a block that a query sees nothing of the weights are 1, and vanish when it sees something.
            scores = mx.where(mx.tile(mask, (scores.shape[2] // len(mask), 1)), scores, _HIDDEN)
        state = _joined(state, scores, v)
        del cached, k, v, scores
        compute(state)
    _, total, out = state
    return out / total


def _visible(mask: Mask, row: int, queries: slice, offset: int, keys: slice) -> mx.array | None:
    """The part of a mask for some queries of a row, the first of which follows `offset` keys, if it hides any key."""
    if isinstance(mask, mx.array):
        return mask[queries, keys] if mask.ndim == 2 else mask[row, 0, queries, keys]
    if mask is None or keys.stop <= offset + queries.start + 1:
        return None
    return mx.arange(keys.start, keys.stop) <= mx.arange(offset + queries.start, offset + queries.stop)[:, None]


def _joined(state: list[mx.array], scores: mx.array, v: mx.array) -> list[mx.array]:
    """Greatest score, sum of weights, weighted values, each (1, H, G * L, 1 or D): of the keys so far and a block's."""
    most = mx.stop_gradient(scores.max(axis=-1, keepdims=True))  # any value works: it cancels out
    if state:
        most = mx.maximum(most, state[0])
    weights = mx.power(2.0, scores - most)
    total, out = weights.sum(axis=-1, keepdims=True), (weights.astype(v.dtype) @ v).astype(mx.float32)
    if state:
        less = mx.power(2.0, state[0] - most)
        total, out = total + less * state[1], out + less * state[2]
    return [most, total, out]


def _later(_: mx.array | list[mx.array]) -> None:
    """A `Compute` that leaves it to MLX when."""


def dequantize_kv(arrays: list[mx.array], bits: KVBits, compute: Compute = _later) -> tuple[mx.array, mx.array]:
    (k, k_scales, k_biases), (v, v_scales, v_biases) = arrays[:3], arrays[3:]
    k = mx.dequantize(k, k_scales, k_biases, group_size=bits.group_size, bits=bits.keys)
    compute(k)
    v = mx.dequantize(v, v_scales, v_biases, group_size=bits.group_size, bits=bits.values)
    compute(v)
    return k, v


def make_mask(length: int, window: int | None, cache: KVCache | None = None) -> Mask:
    """The mask for `length` new tokens: query i sees keys j with i - window < j <= i, never left padding.

    The cheapest form that says so: None (one query sees every key it is given), "causal", or a boolean
    array (L, S) or (B, 1, L, S). Call it before the cache takes the new tokens.
    """
    offset = cache.offset if cache else 0
    first = cache.first_visible if cache else 0
    padding = cache.sequence.left_padding if cache else None
    if padding is not None and max(padding) <= first:
        padding = None  # the window has left all padding behind
    if padding is None:
        if length == 1:
            return None
        if window is None or offset + length <= window:
            return "causal"
    queries = mx.arange(offset, offset + length)[:, None]  # (L, 1)
    keys = mx.arange(first, offset + length)  # (S,)
    mask = keys <= queries
    if window is not None:
        mask = mask & (keys > queries - window)
    if padding is not None:
        # Padding sees itself: a row of nothing but masked scores would be NaN and poison the row.
        visible = keys >= mx.array(padding)[:, None, None]  # (B, 1, S)
        mask = ((mask & visible) | (keys == queries))[:, None]  # (B, 1, L, S)
    return mask
