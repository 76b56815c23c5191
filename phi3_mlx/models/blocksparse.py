"""Phi-3-small's block-sparse attention: each head reads only some blocks of the keys.

The sequence is cut into blocks, counted from its first token whatever padding stands before it. Query i, in block
i // b, sees key j <= i if j's block is one of the `local_blocks` that end with the query's own, or is a *vertical*
one: every `stride`-th block, at a place (the head's residue) that differs from head to head. So a query's keys are
the last blocks of the cache, which all heads share, and a strided slice of the older ones.

Many queries are computed in tiles of some blocks, and heads of one residue together: their keys are copied end to end,
so that MLX's attention runs on them with one small mask. A few queries read the cache without a copy: for kv heads
whose query heads have the same residues the older blocks are a view of it. Neither way ever makes a mask or scores of
queries x all keys. Source: arXiv 2404.14219, section 2; `modeling_phi3_small` of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..config import BlockPattern
from . import attention
from .attention import SCORES_AT_ONCE, Mask, scores_of, weighted
from .cache import KVBits, KVCache
from .pass_shape import PassShape

_FEW_QUERIES = 32  # at most this many queries read the cache without a copy
TILE = 256  # at most this many queries share a copy of keys; with fewer, more is copied and less is masked
# Tiles whose copied keys and values, and on the CPU scores, are alive at once: 3.6 where 256 queries of Phi-3-small's
# heads are read behind 2,048 tokens (bench/LOG.md, "One kernel at a time").
_TILES_ALIVE = 4


@dataclass(frozen=True)
class _Heads:
    """Query heads that are computed together, the kv heads that they read, and their residues."""

    query: tuple[int, ...]
    kv: tuple[int, ...]
    residues: tuple[int, ...]


def attend_in_blocks(
    q: mx.array, seen: list[mx.array], cache: KVCache | None, scale: float, mask: Mask, pattern: BlockPattern
) -> mx.array:
    """`attention.attend` for a layer with a pattern: q (B, H, L, D), `seen` as `fetched` gives it -> (B, L, H * D).

    There may be fewer queries than new keys: the newest. `mask` is that of the dense layers, used while the pattern
    hides no key.
    """
    batch, _, length, _ = q.shape
    padding = (None if cache is None else cache.sequence.left_padding) or (0,) * batch
    if seen[0].shape[2] - min(padding) <= pattern.reach:
        return attention.attend(q, seen, cache, scale, mask)
    bits = None if cache is None else cache.bits
    if len(set(padding)) == 1:
        out = _attend_unpadded(q, seen, bits, scale, pattern, padding[0])
    else:  # the blocks of each row begin elsewhere
        rows = [
            _attend_unpadded(q[b : b + 1], [array[b : b + 1] for array in seen], bits, scale, pattern, before)
            for b, before in enumerate(padding)
        ]
        out = mx.concatenate(rows)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _attend_unpadded(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, pattern: BlockPattern, padding: int
) -> mx.array:
    """Attention of rows with the same padding, which is cut off; the output is 0 for queries that are padding."""
    batch, heads, length, dim = q.shape
    start = seen[0].shape[2] - length - padding  # position of the first query
    if start + length <= 0:
        return mx.zeros_like(q)
    if start < 0:
        rest = _attend_unpadded(q[:, :, -start:], seen, bits, scale, pattern, padding)
        return mx.concatenate([mx.zeros((batch, heads, -start, dim), rest.dtype), rest], axis=2)
    seen = [array[:, :, padding:] for array in seen]
    few = length <= _FEW_QUERIES and batch * heads * length * (start + length) <= SCORES_AT_ONCE
    return (_attend_few if few else _attend_in_tiles)(q, seen, bits, scale, pattern, start)


def _attend_in_tiles(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, pattern: BlockPattern, start: int
) -> mx.array:
    """Some blocks of queries, and the heads of one residue, at a time; each tile waits for the one before it."""
    batch, heads, length, _ = q.shape
    classes = _by_residue(pattern, heads, seen[0].shape[1])
    tiles: list[mx.array] = []
    first, end = start, start + length
    while first < end:
        last = min(end, (first // pattern.block_size + _tile_blocks(batch, heads, first, pattern)) * pattern.block_size)
        old = pattern.oldest_local(first)
        parts: list[mx.array] = []
        for members in classes:
            (residue,) = members.residues
            vertical = slice(residue, old, pattern.stride)  # blocks
            near = slice(old * pattern.block_size, last)
            stored = seen
            if parts or tiles:
                stored = mx.depends(seen, (parts or tiles)[-1:])
            keys = [_gather(_pick(array, members.kv), vertical, near, pattern.block_size) for array in stored]
            key, value = (keys[0], keys[1]) if bits is None else attention.dequantize_kv(keys, bits)
            positions = np.concatenate([_tokens(range(old)[vertical], pattern.block_size), np.arange(near.start, last)])
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    _pick(q[:, :, first - start : last - start], members.query),
                    key,
                    value,
                    scale=scale,
                    mask=_visible(pattern, residue, first, last, positions),
                )
            )
        tiles.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1))
        first = last
    out = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
    order = [head for members in classes for head in members.query]
    return out if order == sorted(order) else out[:, mx.array(np.argsort(order))]


def _tile_blocks(batch: int, heads: int, first: int, pattern: BlockPattern) -> int:
    """How many blocks of queries to take at once from position `first` on, so that their scores stay bounded."""
    block, most = pattern.block_size, max(1, TILE // pattern.block_size)
    return max(1, min(most, SCORES_AT_ONCE // (batch * _at_once(heads, pattern) * _keys(first, most, pattern) * block)))


def _at_once(heads: int, pattern: BlockPattern) -> int:
    """About how many heads have the same residue."""
    return -(-heads // pattern.stride) if pattern.head_step else heads


def _keys(first: int, blocks: int, pattern: BlockPattern) -> int:
    """How many keys are read by `blocks` blocks of queries from position `first` on."""
    old = pattern.oldest_local(first)
    return pattern.block_size * (old // pattern.stride + pattern.local_blocks - 1 + blocks)


def tile_size(
    batch: int, heads: int, kv_heads: int, chunk: int, length: int, pattern: BlockPattern
) -> tuple[int, int, int, int]:
    """(queries, keys, heads, kv heads) of the last tile of a chunk that ends a sequence of `length`."""
    first = max(0, length - chunk)
    blocks = _tile_blocks(batch, heads, first, pattern)
    here = _at_once(heads, pattern)
    return min(chunk, blocks * pattern.block_size), _keys(first, blocks, pattern), here, min(here, kv_heads)


def tile_bytes(shape: PassShape, pattern: BlockPattern) -> int:
    """Bytes that a call of `attend_in_blocks` writes: of tiles alive keys and values (B, Hkv, keys, D), and scores.

    Scores (B, H, queries, keys) are float32, on the CPU alone. A packed cache's tile is dequantized.
    """
    heads, kv_heads = shape.config.num_attention_heads, shape.config.num_key_value_heads
    queries, keys, heads, kv_heads = tile_size(shape.rows, heads, kv_heads, shape.chunk, shape.length, pattern)
    of_key_and_value = 2 * _TILES_ALIVE * shape.itemsize
    if shape.bits is not None:
        of_key_and_value = max(of_key_and_value, sum(attention.kv_dequantizing_bytes(shape)))
    scores = 0 if shape.fused_kernel else 4 * _TILES_ALIVE * shape.rows * heads * queries * keys
    return shape.rows * kv_heads * keys * shape.config.head_dim * of_key_and_value + scores


def _visible(pattern: BlockPattern, residue: int, first: int, last: int, keys: np.ndarray) -> mx.array:
    """Whether queries first..last-1 of a head of that residue see the keys at those positions: (queries, keys)."""
    block = pattern.block_size
    queries, positions = mx.arange(first, last)[:, None], mx.array(keys.astype(np.int32))
    local = positions >= (queries // block - (pattern.local_blocks - 1)) * block
    vertical = mx.array(keys // block % pattern.stride == residue)
    return (positions <= queries) & (local | vertical)


def visible_keys(pattern: BlockPattern, heads: int, queries: int, keys: int, padding: Sequence[int]) -> mx.array:
    """Which of `keys` keys the last `queries` of each row see: (B, heads, queries, keys); padding sees itself alone."""
    rows = []
    for before in padding:
        of_query, of_key = np.arange(keys - queries, keys)[:, None] - before, np.arange(keys) - before
        blocks, residues = of_key // pattern.block_size, np.array([pattern.residue(head) for head in range(heads)])
        local = blocks > of_query // pattern.block_size - pattern.local_blocks
        vertical = blocks % pattern.stride == residues[:, None, None]
        seen = (of_key <= of_query) & (of_key >= 0) & (local | vertical)
        rows.append(seen | (of_key == of_query))
    return mx.array(np.stack(rows))


def _gather(array: mx.array, vertical: slice, near: slice, block: int) -> mx.array:
    """The vertical blocks and then the slots `near` of (B, H, slots, n), end to end."""
    if vertical.start >= vertical.stop:
        return array[:, :, near]
    old = mx.unflatten(array[:, :, : vertical.stop * block], 2, (vertical.stop, block))[:, :, vertical]
    return mx.concatenate([mx.flatten(old, 2, 3), array[:, :, near]], axis=2)


def _tokens(blocks: Sequence[int], block: int) -> np.ndarray:
    """The positions of all tokens in these blocks."""
    return (np.array(blocks, dtype=np.int64)[:, None] * block + np.arange(block)).reshape(-1)


def _attend_few(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, scale: float, pattern: BlockPattern, start: int
) -> mx.array:
    """A few queries: scores of the near keys and of the older vertical blocks, side by side under one softmax.

    The old keys are whole strides, of each of which a head sees one block; all keys after them count as near.
    """
    heads, kv_heads = q.shape[1], seen[0].shape[1]
    q = mx.unflatten(q * scale, 1, (kv_heads, heads // kv_heads))  # (B, Hkv, G, L, D)
    phases = _by_phase(pattern, heads, kv_heads)
    parts = [
        _attend_phase(_pick(q, phase.kv), [_pick(array, phase.kv) for array in seen], bits, pattern, phase, start)
        for phase in phases
    ]
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    order = [kv for phase in phases for kv in phase.kv]
    out = out if order == sorted(order) else out[:, mx.array(np.argsort(order))]
    return mx.flatten(out, 1, 2)


def _attend_phase(
    q: mx.array, seen: list[mx.array], bits: KVBits | None, pattern: BlockPattern, phase: _Heads, start: int
) -> mx.array:
    """`_attend_few` for the U kv heads of a phase: scaled q (B, U, G, L, D) -> the same shape."""
    *_, group, length, _ = q.shape
    block, stride, half = pattern.block_size, pattern.stride, len(seen) // 2  # the first half are the keys' arrays
    strides = pattern.oldest_local(start) // stride
    split = strides * stride * block  # old keys before it, near ones from it on
    near = seen[0].shape[2] - split
    close = [array[:, :, split:] for array in seen]
    scores = scores_of(mx.flatten(q, 2, 3), close[:half], bits)  # (B, U, G * L, near)
    scores = mx.unflatten(scores, 2, (group, length)).astype(mx.float32)
    scores = mx.where(_visible_near(pattern, phase.residues, start, length, split), scores, -mx.inf)
    old: list[mx.array] = []
    if strides:
        for array in seen:
            blocks = mx.unflatten(array[:, :, :split], 2, (strides, stride, block))
            old.append(_pick(blocks, phase.residues, axis=3).transpose(0, 1, 3, 2, 4, 5))  # (B, U, G, n, b, ·)
        each = mx.broadcast_to(q[:, :, :, None], (*q.shape[:3], strides, *q.shape[3:]))
        far = scores_of(each, old[:half], bits)  # (B, U, G, n, L, b)
        far = far.transpose(0, 1, 2, 4, 3, 5).reshape(*scores.shape[:4], -1).astype(mx.float32)
        scores = mx.concatenate([scores, far], axis=-1)
    weights = mx.softmax(scores, axis=-1).astype(q.dtype)  # (B, U, G, L, near + n * b)
    out = weighted(mx.flatten(weights[..., :near], 2, 3), close[half:], bits).reshape(q.shape)
    if strides:
        by_block = mx.unflatten(weights[..., near:], -1, (strides, block)).transpose(0, 1, 2, 4, 3, 5)
        out = out + weighted(by_block, old[half:], bits).sum(axis=3)
    return out


@lru_cache(maxsize=8)
def _visible_near(pattern: BlockPattern, residues: tuple[int, ...], start: int, length: int, split: int) -> mx.array:
    """Whether heads of these residues see the keys from `split` on: (G, L, keys). The same in all layers of a step."""
    queries, keys = np.arange(start, start + length)[:, None], np.arange(split, start + length)
    local = keys >= (queries // pattern.block_size - (pattern.local_blocks - 1)) * pattern.block_size
    vertical = keys // pattern.block_size % pattern.stride == np.array(residues)[:, None, None]
    return mx.array((keys <= queries) & (local | vertical))


def _pick(array: mx.array, indexes: tuple[int, ...], axis: int = 1) -> mx.array:
    """`array` at these places of an axis: a view if they are evenly spaced, of one place if they are all the same."""
    steps = {b - a for a, b in pairwise(indexes)}
    if len(steps) > 1:
        return mx.take(array, mx.array(indexes), axis=axis)
    step = steps.pop() if steps else 1
    first, last = indexes[0], indexes[-1]
    if step == 0:
        here = slice(first, first + 1)
    elif step > 0:
        here = slice(first, last + 1, step)
    else:
        here = slice(first, last - 1 if last else None, step)
    return array[(slice(None),) * axis + (here,)]


@cache
def _by_residue(pattern: BlockPattern, heads: int, kv_heads: int) -> tuple[_Heads, ...]:
    """The heads grouped by residue."""
    group = heads // kv_heads
    classes = []
    for residue in sorted({pattern.residue(head) for head in range(heads)}, reverse=True):
        query = tuple(head for head in range(heads) if pattern.residue(head) == residue)
        kv = tuple(head // group for head in query)
        once = tuple(sorted(set(kv)))
        each = len(kv) // len(once)
        if kv == tuple(head for head in once for _ in range(each)):
            kv = once  # every kv head has the same number of query heads, as MLX's attention requires
        classes.append(_Heads(query, kv, (residue,)))
    return tuple(classes)


@cache
def _by_phase(pattern: BlockPattern, heads: int, kv_heads: int) -> tuple[_Heads, ...]:
    """The heads grouped by kv heads whose query heads have the same residues."""
    group = heads // kv_heads
    phases: dict[tuple[int, ...], list[int]] = {}
    for kv in range(kv_heads):
        phases.setdefault(tuple(pattern.residue(kv * group + j) for j in range(group)), []).append(kv)
    return tuple(
        _Heads(tuple(kv * group + j for kv in members for j in range(group)), tuple(members), residues)
        for residues, members in phases.items()
    )
