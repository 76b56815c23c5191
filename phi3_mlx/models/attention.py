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

# What one attention call may write to memory beside its result, in numbers.
SCORES_AT_ONCE = 1 << 24  # scores of a few queries on a GPU, and of block-sparse tiles anywhere: 64 MB of float32
_DEQUANTIZED_AT_ONCE = 1 << 24  # keys of a packed cache on a GPU, and as many values
_CUDA_FACTOR = 8  # times as many on CUDA: a server's GPU has the memory, and a head or two would leave most of it idle
BLOCK = (
    1 << 20
)  # scores on the CPU, where MLX has no fused kernel: 4 MB of float32, which stay in the processor's cache
_BLOCK_QUERIES, _BLOCK_KEYS = 512, 1024  # a block on the CPU has at most 512 queries and at least 1,024 keys

_ONE_HEAD_SLOTS = 1024  # a packed cache with at least this many slots is read one head at a time on the CPU
_DIRECT_QUERIES = 32  # at most this many queries are multiplied by a packed cache as it is
_MASKED = float(np.finfo(np.float32).min)  # the score of a key that a query does not see; finite, see `_over_blocks`

# Bytes of a score of a block, by the bytes of a number: scores and weights in float32, and in 16 bits the products
# before and after beside them. Measured with the results of a block: 9 and 13.5 (bench/LOG.md, "One kernel at a time").
_SCORE_BYTES = {4: 8, 2: 14}

Mask = mx.array | str | None
Compute = Callable[[mx.array | list[mx.array]], None]


def fetched(k: mx.array, v: mx.array, cache: KVCache | None) -> list[mx.array]:
    """All keys and values that the queries of new ones may see, as the cache stores them; k and v (B, Hkv, L, D)."""
    return [k, v] if cache is None else cache.update_and_fetch(k, v)


def attend(q: mx.array, seen: list[mx.array], cache: KVCache | None, scale: float, mask: Mask) -> mx.array:
    """Softmax attention; q (B, H, L, D), `seen` as `fetched` gives it -> (B, L, H * D). Softmax in float32.

    There may be fewer queries than new keys: the newest, with the mask that they have.
    """
    bits = None if cache is None else cache.bits
    batch, heads, length, dim = q.shape
    if length == 1 and bits is None and not isinstance(mask, str) and not fused_attention():
        queries = q.reshape(batch, -1, heads // seen[0].shape[1], dim)
        return _attend_one(queries, seen[0], seen[1], scale, mask).reshape(batch, 1, -1)
    numbers = batch * heads * length * seen[0].shape[2]
    # Each part is computed before the next is queued. Not without a cache: this may be training, whose graph is one.
    compute = mx.eval if cache is not None and cache.awaited else _leave_to_mlx
    if bits is not None and length <= _DIRECT_QUERIES and not on_cuda():
        out = _attend_packed(q, seen, bits, scale, mask)
    elif not fused_attention() and (bits is not None or (length > _DIRECT_QUERIES and numbers > BLOCK)):
        # On the CPU MLX allocates for ten operations ahead, so each block is computed before the next is queued.
        out = _attend_in_blocks(q, seen, bits, scale, mask, compute)
    elif bits is not None:
        out = _attend_some_heads(q, seen, bits, scale, mask, compute)
    else:
        if length == 1 and cache is not None and cache.window is not None and on_cuda():
            # MLX's CUDA kernel for one query ignores where a view begins and reads the whole array from its first slot.
            seen = [mx.contiguous(array) for array in seen]
        out = mx.fast.scaled_dot_product_attention(q, seen[0], seen[1], scale=scale, mask=mask)
    if length > 1:
        out = out.transpose(0, 2, 1, 3)
    return out.reshape(batch, length, -1)


@partial(mx.compile, shapeless=True)
def _attend_one(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """One query a head of a row, of which each key has G: q (B, Hkv, G, D), k and v (B, Hkv, S, D) -> (B, Hkv, G, D).

    On the CPU, where MLX writes its own attention out in three times as many operations. mask (B, 1, 1, S) or None.
    """
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return mx.softmax(scores, axis=-1, precise=True) @ v


def attention_bytes(shape: PassShape, keys: int) -> int:
    """Bytes that a call of `attend` writes beside its result, where the queries of `shape` see `keys` keys of a row."""
    if shape.fused_kernel:
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
    """Whether this is CUDA, whose quantized products take neither heads of 96 nor views of larger arrays."""
    return fused_attention() and not mx.metal.is_available()


def dequantized_at_once() -> int:
    """How many numbers of the keys of a packed cache, and as many of the values, are dequantized at once on a GPU."""
    return _DEQUANTIZED_AT_ONCE * (_CUDA_FACTOR if on_cuda() else 1)


def _attend_packed(q: mx.array, seen: list[mx.array], bits: KVBits, scale: float, mask: Mask) -> mx.array:
    """A few queries against packed keys and values, which are multiplied as they are, some heads at a time."""
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


def heads_at_once(queries: int, slots: int, fused_kernel: bool) -> int:
    """How many kv heads of a packed cache, with `queries` queries each, are read at once; `fused_kernel`: on a GPU.

    MLX's CPU backend copies arrays that are not contiguous. The slots in use are contiguous within one head alone, so a
    long cache is read head by head there.
    """
    return 1 if slots >= _ONE_HEAD_SLOTS and not fused_kernel else max(1, SCORES_AT_ONCE // (queries * slots))


def decoding_bytes(shape: PassShape, step: int) -> int:
    """Bytes that attention writes while `step` tokens of all rows are generated, or drafted and verified, at once.

    Their scores (H, step, S), in float32, of a packed cache also in the type of computation, of a call's heads.
    """
    keys, kv_heads = shape.keys, shape.config.num_key_value_heads
    queries = step * (shape.config.num_attention_heads // kv_heads)  # of a key head
    if shape.bits is None:
        return 0 if shape.fused_kernel else 4 * queries * kv_heads * keys
    if shape.fused_kernel and on_cuda():
        return _some_heads_bytes(shape, keys)
    return (4 + shape.itemsize) * queries * min(kv_heads, heads_at_once(queries, keys, shape.fused_kernel)) * keys


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
    """MLX's fused attention over a packed cache, with some heads dequantized at a time.

    If the cache is large, each group of heads is computed before the next is dequantized, because a GPU frees nothing
    that is still in its queue.
    """
    batch, heads, _, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    group, at_once = heads // kv_heads, max(1, dequantized_at_once() // (batch * slots * dim))
    wait = compute if batch * kv_heads * slots * dim > _DEQUANTIZED_AT_ONCE else _leave_to_mlx
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
    """The most that a block on the CPU has: (queries of each of `group` query heads, keys of all its kv heads)."""
    rows = max(1, min(_BLOCK_QUERIES, BLOCK // (group * _BLOCK_KEYS)))
    return rows, max(1, BLOCK // (group * rows))


def _attend_in_blocks(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, mask: Mask, compute: Compute
) -> mx.array:
    """Some heads and queries at a time, over the keys block by block, so that memory does not grow with the keys.

    The running sums are rescaled when a larger score appears (arXiv 2112.05682). exp(x) is computed as 2^(x log2(e)),
    because on the CPU MLX's `power` takes less than half the time of its `exp`.
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
            # No query of this tile sees a later key.
            cached = [array[b : b + 1, head : head + at_once, : slots - (length - last)] for array in seen]
            if before := tiles or parts:  # keeps MLX from computing all of them at once
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
    return not shape.fused_kernel and (shape.bits is not None or scores > BLOCK)


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
    if shape.bits is None or shape.fused_kernel:
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
            # Where a query sees no key of a block its weights are 1 for now; its first visible key rescales them to 0.
            scores = mx.where(mx.tile(mask, (scores.shape[2] // len(mask), 1)), scores, _MASKED)
        state = _with_block(state, scores, v)
        del cached, k, v, scores
        compute(state)
    _, total, out = state
    return out / total


def _visible(mask: Mask, row: int, queries: slice, offset: int, keys: slice) -> mx.array | None:
    """The part (queries, keys) of a mask for one row, None if it hides no key; query 0 follows `offset` keys."""
    if isinstance(mask, mx.array):
        return mask[queries, keys] if mask.ndim == 2 else mask[row, 0, queries, keys]
    if mask is None or keys.stop <= offset + queries.start + 1:
        return None
    return mx.arange(keys.start, keys.stop) <= mx.arange(offset + queries.start, offset + queries.stop)[:, None]


def _with_block(state: list[mx.array], scores: mx.array, v: mx.array) -> list[mx.array]:
    """The running softmax after one more block of keys, whose `scores` are (1, H, G * L, S).

    Its state is empty before the first block, then largest score, sum of weights (1, H, G * L, 1 each) and weighted
    values (1, H, G * L, D).
    """
    largest = mx.stop_gradient(scores.max(axis=-1, keepdims=True))  # any value works: it cancels out
    if state:
        largest = mx.maximum(largest, state[0])
    weights = mx.power(2.0, scores - largest)
    total, out = weights.sum(axis=-1, keepdims=True), (weights.astype(v.dtype) @ v).astype(mx.float32)
    if state:
        rescale = mx.power(2.0, state[0] - largest)
        total, out = total + rescale * state[1], out + rescale * state[2]
    return [largest, total, out]


def _leave_to_mlx(_: mx.array | list[mx.array]) -> None:
    """A `Compute` that does nothing: MLX decides when."""


def dequantize_kv(arrays: list[mx.array], bits: KVBits, compute: Compute = _leave_to_mlx) -> tuple[mx.array, mx.array]:
    """Keys and values (B, Hkv, S, D) as floats from the six arrays of a packed cache; each is passed to `compute`."""
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
