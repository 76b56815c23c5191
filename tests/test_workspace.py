"""What kernels say of their bytes, from shapes alone, against the arrays that they make."""

from dataclasses import replace

import mlx.core as mx
import oracle
import pytest

from phi3_mlx.engine.lookup import MAX_DRAFT
from phi3_mlx.engine.plan import Workload
from phi3_mlx.models import parse_config
from phi3_mlx.models.cache import KVBits, KVCache, QuantizedKVCache, kv_bytes
from phi3_mlx.models.linear import dequantizing_bytes, most_dequantizing_bytes
from phi3_mlx.models.pass_shape import PassShape
from phi3_mlx.models.workspace import workspace_bytes

BITS = (None, KVBits(8, 8), KVBits(4, 2), KVBits(6, 3, 64))


def config_of(window=None):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
    return parse_config({**oracle.BASE, **heads, "sliding_window": window})


def most_bytes(config, length, bits, dtype, chunk):
    """The most that a layer's cache has while `length` tokens are read by the chunk."""
    window, most, read = config.sliding_window, 0, 0
    cache = KVCache(window=window) if bits is None else QuantizedKVCache(bits, window=window)
    while read < length:
        tokens = min(chunk, length - read)
        cache.update_and_fetch(*(mx.zeros((1, 2, tokens, 64), dtype) for _ in range(2)))
        most, read = max(most, cache.nbytes), read + tokens
    return most


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("length", [1, 256, 257, 700])
def test_a_cache_has_the_bytes_that_its_shapes_say(length, bits, dtype):
    config = config_of()
    assert most_bytes(config, length, bits, dtype, chunk=100) == kv_bytes(config, length, bits, dtype.size)


@pytest.mark.parametrize("bits", BITS[:2], ids=str)
def test_behind_a_window_it_never_has_more(bits):
    config = config_of(window=150)
    planned = kv_bytes(config, 3000, bits, 4)
    assert most_bytes(config, 3000, bits, mx.float32, chunk=1) <= planned < kv_bytes(config_of(), 3000, bits, 4)
    assert planned == kv_bytes(config, 10**6, bits, 4)


def test_a_plan_is_the_weights_the_rows_and_the_workspace():
    workload = Workload(config_of(), 10**6, 500, rows=3, bits=KVBits(4, 4), chunk=64)
    plan = workload.plan(0)
    assert plan.total == 10**6 + 3 * workload.row_bytes() + workload.workspace(64)
    assert workload.row_bytes() == 3 * kv_bytes(workload.config, 500, KVBits(4, 4), 2)  # of three layers
    assert workload.cache_bytes() == 3 * replace(workload, rows=1).cache_bytes()


def test_a_step_of_one_row_is_a_draft_and_of_several_a_token_each():
    one, three = (Workload(config_of(), 0, 500, rows, itemsize=4, fused_kernel=False) for rows in (1, 3))
    for workload, step in ((one, MAX_DRAFT + 1), (replace(one, verified=33), 33), (three, 3)):
        shape = PassShape(workload.config, 64, 500, workload.rows, itemsize=4, fused_kernel=False)
        assert workload.workspace(64) == workspace_bytes(shape, step)


def test_a_pass_reads_no_more_than_there_is_and_sees_its_window():
    shape = PassShape(config_of(window=100), chunk=64, length=500, rows=2)
    assert (shape.queries, shape.tokens, shape.keys) == (64, 128, 164)
    assert shape.is_masked(101)
    assert not shape.is_masked(100)
    short = PassShape(config_of(), chunk=64, length=5, rows=2)
    assert (short.queries, short.tokens, short.keys) == (5, 10, 5)
    assert not short.is_masked(5)


def test_a_layer_of_more_demanding_bits_counts():
    assert most_dequantizing_bytes({"group_size": 64, "bits": 4}, 4) == dequantizing_bytes(4, 4)
    own = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 6}, "model.embed_tokens": False}
    assert most_dequantizing_bytes(own, 4) == dequantizing_bytes(6, 4) > dequantizing_bytes(4, 4)
