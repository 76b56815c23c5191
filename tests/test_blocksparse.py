"""Block-sparse attention against dense masks in float64, whatever the pattern, the chunks, the padding, the cache."""

import itertools

import mlx.core as mx
import naive_small
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlx.config import BlockPattern
from phi3_mlx.models import blocksparse
from phi3_mlx.models.attention import fetched, make_mask
from phi3_mlx.models.cache import KVBits, KVCache, QuantizedKVCache, SequenceState

DIM = 32  # the least that a packed cache takes
SCALE = 0.4
TRUE = BlockPattern(block_size=64, local_blocks=16, stride=8, head_step=1)  # Phi-3-small's: 32 heads, 8 kv heads


def raw_of(pattern: BlockPattern, heads: int) -> dict:
    """The config.json keys of the pattern."""
    return {
        "blocksparse_block_size": pattern.block_size,
        "blocksparse_num_local_blocks": pattern.local_blocks,
        "blocksparse_vert_stride": pattern.stride,
        "blocksparse_homo_head_pattern": pattern.head_step == 0,
        "num_attention_heads": heads,
    }


def expected(q, k, v, pattern: BlockPattern) -> np.ndarray:
    """One row, q (H, L, D), k and v (Hkv, L, D) -> (L, H * D), by the oracle."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    heads, length, _ = q.shape
    raw, group, out = raw_of(pattern, heads), heads // len(k), []
    for head in range(heads):
        mask = naive_small.visible(raw, head, length)
        out.append(naive_small.attention(q[head], k[head // group], v[head // group], mask, SCALE))
    return np.concatenate(out, axis=1)


def random(heads: int, kv_heads: int, length: int, rows: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [2 * rng.standard_normal((rows, n, length, DIM)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def read(arrays, pattern: BlockPattern, edges, padding=None, bits=None) -> np.ndarray:
    """What attention gives when the arrays come in pieces that end at `edges`: (B, L, H * D)."""
    sequence = SequenceState(left_padding=padding)
    cache = KVCache(sequence) if bits is None else QuantizedKVCache(bits, sequence)
    parts = []
    for first, last in itertools.pairwise([0, *edges, arrays[0].shape[2]]):
        q, k, v = (mx.array(array[:, :, first:last]) for array in arrays)
        mask = make_mask(last - first, None, cache)
        seen = fetched(k, v, cache)
        parts.append(np.array(blocksparse.attend_in_blocks(q, seen, cache, SCALE, mask, pattern)))
    return np.concatenate(parts, axis=1)


@st.composite
def cases(draw):
    """(pattern, heads, kv heads, length, edges of pieces, queries of a tile, queries that are few)"""
    heads = draw(st.integers(1, 4)) * (kv_heads := draw(st.integers(1, 4)))
    stride = draw(st.integers(1, 10))
    step = draw(st.sampled_from([0, max(1, stride // heads)]))
    pattern = BlockPattern(draw(st.integers(1, 5)), draw(st.integers(1, 4)), stride, step)
    length = draw(st.integers(1, 70))
    edges = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))) if length > 1 else []
    return pattern, heads, kv_heads, length, edges, draw(st.integers(1, 24)), draw(st.sampled_from([0, 1, 6, 32]))


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 3))
def test_any_pattern_in_any_pieces_is_the_oracle(case, seed):
    pattern, heads, kv_heads, length, edges, tile, few = case
    arrays = random(heads, kv_heads, length, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocksparse, "TILE", tile)
        patch.setattr(blocksparse, "_FEW_QUERIES", few)
        found = read(arrays, pattern, edges)[0]
    assert np.abs(found - expected(*(array[0] for array in arrays), pattern)).max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(cases(), st.lists(st.integers(0, 30), min_size=2, max_size=3))
def test_rows_of_any_padding_are_as_alone(case, padding):
    pattern, heads, kv_heads, length, edges, tile, few = case
    padding = [min(n, length - 1) for n in padding]
    arrays = random(heads, kv_heads, length, len(padding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocksparse, "TILE", tile)
        patch.setattr(blocksparse, "_FEW_QUERIES", few)
        found = read(arrays, pattern, edges, tuple(padding))
    assert np.isfinite(found).all(), "padding that were NaN would poison its row"
    for row, before in enumerate(padding):
        alone = expected(*(array[row, :, before:] for array in arrays), pattern)
        assert np.abs(found[row, before:] - alone).max() < 1e-4


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([KVBits(8, 8), KVBits(4, 8), KVBits(3, 2)]), st.sampled_from([None, (3, 0)]))
def test_a_packed_cache_is_the_oracle_on_what_it_dequantizes_to(case, bits, padding):
    pattern, heads, kv_heads, length, edges, tile, few = case
    padding = None if padding is None else tuple(min(n, length - 1) for n in padding)
    arrays = random(heads, kv_heads, length, len(padding or (0,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocksparse, "TILE", tile)
        patch.setattr(blocksparse, "_FEW_QUERIES", few)
        # Sequences that see everything take the road of all models, which has its own tests.
        found = read(arrays, pattern, edges, padding, bits)
    for array, width in ((arrays[1], bits.keys), (arrays[2], bits.values)):
        array[:] = mx.dequantize(*mx.quantize(mx.array(array), 32, width), 32, width)
    for row, before in enumerate(padding or (0,)):
        alone = expected(*(array[row, :, before:] for array in arrays), pattern)
        assert np.abs(found[row, before:] - alone).max() < 1e-4


@pytest.mark.parametrize("length", [1025, 1601])
def test_the_true_pattern_at_the_true_block_size(length):
    arrays = random(16, 4, length)
    positions = np.arange(length)
    blocks = positions // 64
    causal, near = positions <= positions[:, None], blocks[:, None] - blocks < 16
    found = read(arrays, TRUE, [min(length - 1, 700), length - 1])[0]
    q, k, v = (array[0].astype(np.float64) for array in arrays)
    for head in (0, 5, 7, 15):
        mask = causal & (near | ((blocks + head + 1) % 8 == 0))
        out = naive_small.attention(q[head, -80:], k[head // 4], v[head // 4], mask[-80:], SCALE)
        assert np.abs(found[-80:, head * DIM : (head + 1) * DIM] - out).max() < 1e-4


@pytest.mark.parametrize("queries", [1, 20, 200])
def test_only_blocks_that_a_group_sees_are_read(queries):
    """Keys and values of the others are NaN, which any arithmetic with them would show."""
    heads, kv_heads, length = 16, 4, 64 * 16 + 64 * 8 * 2
    q, k, v = random(heads, kv_heads, length)
    kept = 0
    for kv in range(kv_heads):
        residues = {TRUE.residue(kv * 4 + j) for j in range(4)}
        for block in range((length - queries) // 64 - 15 - 7):  # the strides that are no whole ones count as near
            if block % 8 in residues:
                kept += 1
            else:
                k[0, kv, block * 64 : block * 64 + 64] = v[0, kv, block * 64 : block * 64 + 64] = np.nan
    assert kept
    start = length - queries
    out = blocksparse._attend_unpadded(mx.array(q[:, :, start:]), [mx.array(k), mx.array(v)], None, SCALE, TRUE, 0)
    assert mx.isfinite(out).all().item()


@pytest.mark.parametrize("few", [0, 32])
def test_gradients_are_those_of_a_dense_mask(few, monkeypatch):
    monkeypatch.setattr(blocksparse, "_FEW_QUERIES", few)
    monkeypatch.setattr(blocksparse, "TILE", 6)
    pattern, heads = BlockPattern(3, 2, 3, 1), 4
    q, k, v = (mx.array(array) for array in random(heads, 2, 29))
    mask = mx.array(np.stack([naive_small.visible(raw_of(pattern, heads), head, 29) for head in range(heads)]))
    weights = mx.random.normal((1, 29, heads * DIM), key=mx.random.key(1))

    def sparse(q, k, v):
        return (blocksparse.attend_in_blocks(q, [k, v], None, SCALE, "causal", pattern) * weights).sum()

    def dense(q, k, v):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask)
        return (out.transpose(0, 2, 1, 3).reshape(1, 29, -1) * weights).sum()

    for ours, theirs in zip(*(mx.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (sparse, dense)), strict=True):
        assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-4


def test_scores_and_masks_stay_small():
    """The peak is a small part of what one mask and the scores of all keys would take, and grows with no square."""
    peaks = []
    for length in (4096, 8192):
        arrays = [mx.array(array) for array in random(8, 2, length)]
        q, seen = arrays[0][:, :, -512:], arrays[1:]
        mx.eval(q, seen)
        mx.clear_cache()
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        mx.eval(blocksparse._attend_unpadded(q, seen, None, SCALE, TRUE, 0))
        peaks.append(mx.get_peak_memory() - base)
    assert peaks[1] < 0.25 * 8 * 512 * 8192 * 4
    assert peaks[1] - peaks[0] < 0.25 * 8 * 512 * 4096 * 4
