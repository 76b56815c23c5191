"""Which keys a query may see, and the attention call all models share."""

from __future__ import annotations

import mlx.core as mx

from .cache import KVCache

Mask = mx.array | str | None


def attend(q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None, scale: float, mask: Mask) -> mx.array:
    """Softmax attention; q (B, H, L, D), k and v (B, Hkv, L, D) -> (B, L, H * D). Softmax in float32."""
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    batch, _, length, _ = out.shape
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


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
