"""Attention over a cache, plain and packed, whole and in blocks: the textbook sums in float64 over what it keeps."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from oracle import CONFIGS, ORIGINAL, WINDOW, ids_of, last_logits, slim

from phi3_mlx.models import attention
from phi3_mlx.models.cache import KVBits, KVCache, QuantizedKVCache, SequenceState

SCALE, HEADS, KV_HEADS, DIM = 0.125, 6, 2, 64


def naive(q, k, v, visible):
    """softmax(q k^T) v with every score written down; arrays (B, H, L, D), visible (B, 1, L, S)."""
    q, k, v = (np.array(x, dtype=np.float64) for x in (q, k, v))
    k, v = (x.repeat(HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.where(visible, q @ k.swapaxes(-1, -2) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def rounded(x, group_size, bits):
    return mx.dequantize(*mx.quantize(x, group_size, bits), group_size, bits)


LIMITS = {
    "as shipped": {},
    "tiny blocks": {"_DIRECT_QUERIES": 0, "BLOCK": 20, "_BLOCK_KEYS": 4, "_DEQUANTIZED_AT_ONCE": 300},
    "head by head": {"_ONE_HEAD_SLOTS": 6},
    "as on Metal": {
        "fused_attention": lambda: True,
        "on_cuda": lambda: False,
        "_DIRECT_QUERIES": 4,
        "_DEQUANTIZED_AT_ONCE": 2000,
        "SCORES_AT_ONCE": 200,
    },
    "as on CUDA": {"fused_attention": lambda: True, "on_cuda": lambda: True, "_DEQUANTIZED_AT_ONCE": 2000},
    "some heads": {
        "_DIRECT_QUERIES": 0,
        "BLOCK": 400,
        "_BLOCK_QUERIES": 5,
        "_BLOCK_KEYS": 8,
        "_DEQUANTIZED_AT_ONCE": 2000,
    },
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("padding", [None, (3, 0)], ids=["even", "ragged"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("bits", [None, KVBits(8, 8), KVBits(4, 3), KVBits(2, 6, 64)], ids=str)
def test_attention_is_the_textbooks(bits, window, padding, limits, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    for name, value in limits.items():
        monkeypatch.setattr(attention, name, value)
    sequence = SequenceState(left_padding=padding)
    cache = KVCache(sequence, window) if bits is None else QuantizedKVCache(bits, sequence, window)
    random = np.random.default_rng(0)
    keys, values = [], []
    for length in (12, 5, 1, 3, 1, 7):
        q, k, v = (
            mx.array(random.standard_normal((2, heads, length, DIM)).astype(np.float32))
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        offset = cache.offset
        mask = attention.make_mask(length, window, cache)
        out = attention.attend(q, attention.fetched(k, v, cache), cache, SCALE, mask)
        keys.append(k if bits is None else rounded(k, bits.group_size, bits.keys))
        values.append(v if bits is None else rounded(v, bits.group_size, bits.values))
        query, key = np.arange(offset, offset + length)[:, None], np.arange(offset + length)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        visible = np.stack([visible & (key >= pad) | (key == query) for pad in padding or (0, 0)])[:, None]
        expected = naive(q, mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2), visible)
        assert np.abs(np.array(out) - expected).max() < 2e-5


@pytest.mark.parametrize("bits", [KVBits(8, 8), KVBits(4, 2)], ids=str)
def test_a_packed_cache_has_the_bytes_of_its_bits(bits):
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    plain, packed = model.make_cache(), model.make_cache(bits=bits)
    for cache in (plain, packed):
        model(mx.array(ids_of(30)), cache)
    config = model.config
    numbers = config.num_key_value_heads * config.head_dim * KVCache.step * len(model.layers)
    assert sum(layer.nbytes for layer in plain) == numbers * 2 * 4
    scales = 2 * 2 * 4 * numbers // bits.group_size  # keys and values, scales and biases, float32
    assert sum(layer.nbytes for layer in packed) == numbers * (bits.keys + bits.values) // 8 + scales


@pytest.mark.parametrize("name", ["mini-4k", "3.5-mini", "phi-4-mini"])
def test_a_packed_cache_crosses_trims_and_rereads_like_a_plain_one(name, monkeypatch):
    """8 bits stay close to the plain numbers; keys of the wrong regime or position would be far off."""
    monkeypatch.setattr(KVCache, "step", 4)
    model = oracle.make_ours(slim(CONFIGS[name]))
    ids = ids_of(2 * ORIGINAL)
    cache = model.make_cache(bits=KVBits(8, 8))
    spread = last_logits(model, ids[:, :ORIGINAL]).std()

    def check(last, read):
        assert np.abs(last - last_logits(model, read)).max() < 0.08 * spread

    for first in range(0, ORIGINAL - 3, 7):
        last = last_logits(model, ids[:, first : min(first + 7, ORIGINAL - 3)], cache)
    check(last, ids[:, : ORIGINAL - 3])
    for t in range(ORIGINAL - 3, ORIGINAL + 3):  # one by one over the boundary
        check(last_logits(model, ids[:, t : t + 1], cache), ids[:, : t + 1])
    for layer in cache:
        layer.trim(9)
    check(last_logits(model, ids[:, ORIGINAL - 6 : ORIGINAL - 2], cache), ids[:, : ORIGINAL - 2])
    check(last_logits(model, ids[:, ORIGINAL - 2 : ORIGINAL + 2 * WINDOW], cache), ids[:, : ORIGINAL + 2 * WINDOW])


def test_rows_of_a_packed_batch_are_what_they_are_alone():
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    lengths = (ORIGINAL + 6, ORIGINAL - 8)
    rows = [ids_of(n, seed=n) for n in lengths]
    padding = (0, 14)
    batch = np.concatenate([np.pad(row, ((0, 0), (pad, 0))) for row, pad in zip(rows, padding, strict=True)])
    cache = model.make_cache(prompt_length=lengths, left_padding=padding, bits=KVBits(8, 8))
    together = last_logits(model, batch, cache)
    for i, row in enumerate(rows):
        alone = last_logits(model, row, model.make_cache(bits=KVBits(8, 8)))
        assert np.abs(together[i] - alone[0]).max() < 3e-4


def test_attention_of_the_last_layer_is_computed_at_the_end_of_a_prompt_alone(monkeypatch):
    """On the CPU, where each step of the other layers is computed when it is asked for."""
    computed, original = [], attention.dequantize_kv
    monkeypatch.setattr(attention, "_DIRECT_QUERIES", 0)
    monkeypatch.setattr(
        attention, "dequantize_kv", lambda *args: computed.append(args[2] is mx.eval) or original(*args)
    )
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    ids = ids_of(30)
    cache = model.make_cache(prompt_length=30, bits=KVBits(8, 8))
    for first in range(0, 30, 10):
        model.model(mx.array(ids[:, first : first + 10]), cache)
    layers = len(cache)
    inside = [True] * (layers - 1) + [False]
    assert computed == inside + inside + [True] * layers


@pytest.mark.parametrize("bits", [None, KVBits(4, 4)], ids=str)
def test_work_memory_does_not_grow_with_the_keys(bits):
    """On the CPU: a chunk's is bounded, and a token's is one head's scores, of however many are cached."""

    def peaks(slots):
        cache = KVCache() if bits is None else QuantizedKVCache(bits)
        for _ in range(slots // 2048):
            cache.update_and_fetch(*(mx.random.normal((1, KV_HEADS, 2048, DIM)) for _ in range(2)))
            mx.eval(cache.state)
        for length in (128, 1):
            q, k, v = (mx.random.normal((1, heads, length, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
            cache.trim(length)  # in slots that are there
            mx.eval(q, k, v)
            mx.clear_cache()
            mx.reset_peak_memory()
            held = mx.get_active_memory()
            mask = attention.make_mask(length, None, cache)
            mx.eval(attention.attend(q, attention.fetched(k, v, cache), cache, SCALE, mask))
            yield mx.get_peak_memory() - held

    (short, _), (long, token) = peaks(8192), peaks(32768)
    assert long < 1.1 * short
    assert token < 4 * HEADS * 32768 * 4


def test_gradients_in_blocks_are_those_of_all_scores_at_once(monkeypatch):
    q, k, v = (mx.random.normal((2, heads, 50, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def loss(q, k, v):
        return (attention.attend(q, [k, v], None, SCALE, "causal") ** 2).sum()

    gradients = mx.grad(loss, (0, 1, 2))

    whole = gradients(q, k, v)
    monkeypatch.setattr(attention, "BLOCK", 400)
    monkeypatch.setattr(attention, "_BLOCK_KEYS", 16)
    for ours, expected in zip(gradients(q, k, v), whole, strict=True):
        assert mx.abs(ours - expected).max() < 1e-4
