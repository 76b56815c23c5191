"""Attention probabilities, computed beside the kernels, which never write them to memory."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .attention import Mask, scores_of, weighted
from .cache import KVBits


def probabilities(
    q: mx.array,
    seen: list[mx.array],
    bits: KVBits | None,
    scale: float,
    visible: Mask,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> mx.array:
    """The attention probabilities of some heads and queries, of all without them: (B, heads, queries, S) in float32.

    q (B, H, L, D) and `seen` as `attend` takes them; `visible` is its mask, or one for each head (B, H, L, S).
    """
    (batch, all_heads, length, _), (kv_heads, slots) = q.shape, seen[0].shape[1:3]
    if isinstance(visible, str):
        visible = mx.arange(slots) <= mx.arange(slots - length, slots)[:, None]  # (L, S)
    if visible is not None:
        visible = mx.broadcast_to(visible, (batch, all_heads if visible.ndim == 4 else 1, length, slots))
    if queries is not None:
        q = q[:, :, mx.array([*queries])]
        visible = None if visible is None else visible[:, :, mx.array([*queries])]
    group, parts = all_heads // kv_heads, []
    for head in range(all_heads) if heads is None else heads:
        stored = [array[:, head // group : head // group + 1] for array in seen[: len(seen) // 2]]
        scores = scores_of(q[:, head : head + 1] * scale, stored, bits).astype(mx.float32)  # (B, 1, L, S)
        if visible is not None:
            scores = mx.where(visible[:, head % visible.shape[1]][:, None], scores, -mx.inf)
        parts.append(mx.softmax(scores, axis=-1))
    return mx.concatenate(parts, axis=1)


def weighed(weights: mx.array, seen: list[mx.array], bits: KVBits | None) -> mx.array:
    """weights (B, H, L, S) of the values that `seen` has -> (B, H, L, D)."""
    values = seen[len(seen) // 2 :]
    grouped = mx.unflatten(weights, 1, (values[0].shape[1], -1))  # (B, Hkv, G, L, S)
    return weighted(grouped.flatten(2, 3), values, bits).reshape(*weights.shape[:3], -1)
