"""Which keys a query may see, and the attention call all models share."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .cache import KVBits, KVCache

# Limits of what one attention call writes to memory beside its result, in numbers: 64 MB of float32 each.
SCORES = 1 << 24  # queries x keys, where MLX has no fused kernel
UNPACKED = 1 << 24  # keys, and as many values, of a packed cache
_FEW = 32  # queries at most that read a packed cache as it is

Mask = mx.array | str | None
Compute = Callable[[mx.array], None]


def attend(q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None, scale: float, mask: Mask) -> mx.array:
    """Softmax attention; q (B, H, L, D), k and v (B, Hkv, L, D) -> (B, L, H * D). Softmax in float32."""
    seen = [k, v] if cache is None else cache.update_and_fetch(k, v)
    bits = None if cache is None else cache.bits
    batch, heads, length, _ = q.shape
    numbers = batch * heads * length * seen[0].shape[2]
    if bits is not None and (length == 1 or (length <= _FEW and numbers <= SCORES)):
        out = _attend_packed(q, seen, bits, scale, mask)
    elif bits is not None or (not fused_attention() and numbers > SCORES):
        # On the CPU MLX makes room for ten operations ahead, so each step is computed before the next is asked for;
        # not without a cache: this may be training, whose graph is computed as a whole.
        compute = mx.eval if cache is not None and cache.awaited and not fused_attention() else _later
        out = _attend_in_tiles(q, seen, bits, scale, mask, compute)
    else:
        out = mx.fast.scaled_dot_product_attention(q, seen[0], seen[1], scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def fused_attention() -> bool:
    """Whether MLX's attention keeps its scores in registers; on the CPU it writes all of them to memory."""
    return mx.default_device().type == mx.DeviceType.gpu


def _attend_packed(q: mx.array, seen: list[mx.array], bits: KVBits, scale: float, mask: Mask) -> mx.array:
    """A few queries against packed keys and values, which are read as they are: scores (B, Hkv, G * L, S)."""
    batch, heads, length, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    q = (q * scale).reshape(batch, kv_heads, -1, dim)  # (B, Hkv, G * L, D)
    scores = scores_of(q, seen[:3], bits).astype(mx.float32).reshape(batch, kv_heads, -1, length, slots)
    if isinstance(mask, str):
        mask = mx.arange(slots) <= mx.arange(slots - length, slots)[:, None]  # (L, S)
    if mask is not None:
        scores = mx.where(mask if mask.ndim == 2 else mask[:, :, None], scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).astype(q.dtype).reshape(batch, kv_heads, -1, slots)
    return weighted(weights, seen[3:], bits).reshape(batch, heads, length, dim)


def scores_of(q: mx.array, keys: list[mx.array], bits: KVBits | None) -> mx.array:
    """q (..., L, D) with keys (..., S, D) as a cache stores them -> (..., L, S)."""
    if bits is None:
        return q @ keys[0].swapaxes(-1, -2)
    k, scales, biases = keys
    return mx.quantized_matmul(q, k, scales, biases, transpose=True, group_size=bits.group_size, bits=bits.keys)


def weighted(weights: mx.array, values: list[mx.array], bits: KVBits | None) -> mx.array:
    """weights (..., L, S) of values (..., S, D) as a cache stores them -> (..., L, D)."""
    if bits is None:
        return weights @ values[0]
    v, scales, biases = values
    return mx.quantized_matmul(
        weights, v, scales, biases, transpose=False, group_size=bits.group_size, bits=bits.values
    )


def tile_of(batch: int, group: int, length: int, slots: int, dim: int, fused: bool) -> tuple[int, int]:
    """How many queries of a sequence, and how many key heads with their `group` of queries, are treated at once."""
    rows, at_once = length, max(1, UNPACKED // (batch * slots * dim))
    if not fused:
        rows = max(1, min(length, SCORES // (batch * group * slots)))
        at_once = max(1, min(at_once, SCORES // (batch * group * rows * slots)))
    return rows, at_once


def _attend_in_tiles(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, mask: Mask, compute: Compute
) -> mx.array:
    """Some heads, and on the CPU some queries, at a time: what is unpacked and scored at once stays bounded.

    Each tile waits for the one before it, since MLX would else be free to unpack them all first.
    """
    batch, heads, length, dim = q.shape
    kv_heads, slots = seen[0].shape[1], seen[0].shape[2]
    group = heads // kv_heads
    rows, at_once = tile_of(batch, group, length, slots, dim, fused_attention())
    parts: list[mx.array] = []
    for head in range(0, kv_heads, at_once):
        own = [array[:, head : head + at_once] for array in seen]
        if parts:
            own = mx.depends(own, parts[-1:])
        k, v = (own[0], own[1]) if bits is None else unpack(own, bits, compute)
        tiles: list[mx.array] = []
        for first in range(0, length, rows):
            last = min(first + rows, length)
            end = slots - (length - last)  # the tile's last query sees no further
            tile = q[:, head * group : (head + at_once) * group, first:last]
            if tiles:
                (tile,) = mx.depends([tile], tiles[-1:])
            part = mask[..., first:last, :end] if isinstance(mask, mx.array) else mask
            tiles.append(
                mx.fast.scaled_dot_product_attention(tile, k[:, :, :end], v[:, :, :end], scale=scale, mask=part)
            )
            compute(tiles[-1])
        parts.append(mx.concatenate(tiles, axis=2))
        del k, v
    return mx.concatenate(parts, axis=1)


def _later(_: mx.array) -> None:
    """A `Compute` that leaves it to MLX when."""


def unpack(arrays: list[mx.array], bits: KVBits, compute: Compute = _later) -> tuple[mx.array, mx.array]:
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
