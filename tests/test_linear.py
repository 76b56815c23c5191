"""The two ways to multiply by packed weights give the same numbers, and the choice follows rows, device and BLAS."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from phi3_mlx import blas as mlx_blas
from phi3_mlx import load
from phi3_mlx.models import linear


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (3, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slice_", [linear.SLICE, 1000], ids=["whole", "in slices"])
def test_both_ways_give_the_dequantized_product(bits, mode, bias, slice_, monkeypatch):
    monkeypatch.setattr(linear, "SLICE", slice_)
    layer = linear.Linear(64, 96, bias=bias)
    packed = layer.to_quantized(32, bits, mode)
    assert isinstance(packed, nn.QuantizedLinear)
    weight = mx.dequantize(packed.weight, packed.scales, packed.get("biases"), 32, bits, mode)
    x = mx.random.normal((2, 20, 64), key=mx.random.key(0))
    expected = np.array(x, np.float64) @ np.array(weight.astype(mx.float32), np.float64).T + (
        np.array(layer.bias) if bias else 0
    )
    for threshold in (1, 10**9):
        monkeypatch.setattr(linear, "dequantizing_pays", lambda *_, threshold=threshold: threshold)
        assert np.abs(np.array(packed(x)) - expected).max() < 1e-4
        gradient = mx.grad(lambda x: mx.sum(mx.square(packed(x))))(x)
        assert np.abs(np.array(gradient) - 2 * expected @ np.array(weight.astype(mx.float32))).max() < 1e-3


def test_a_large_weight_is_dequantized_slice_by_slice(monkeypatch):
    """Forward and backward in memory of some slices, which a whole dequantized weight would exceed."""
    monkeypatch.setattr(linear, "dequantizing_pays", lambda *_: 1)
    packed = linear.Linear(1024, 8192, bias=False).to_quantized(64, 4)  # 33.6 MB in floats
    x = mx.random.normal((4, 1024))
    mx.eval(packed.parameters(), x)
    for product in (packed, mx.grad(lambda x: packed(x).sum())):
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        mx.eval(product(x))
        assert mx.get_peak_memory() - held < 5 * linear.SLICE * linear.dequantizing_bytes(4, 4)


def test_the_output_embedding_too(monkeypatch):
    packed = linear.Embedding(50, 64).to_quantized(32, 4)
    x = mx.random.normal((20, 64), key=mx.random.key(0))
    monkeypatch.setattr(linear, "dequantizing_pays", lambda *_: 10**9)
    slow = np.array(packed.as_linear(x))
    monkeypatch.setattr(linear, "dequantizing_pays", lambda *_: 1)
    assert np.abs(np.array(packed.as_linear(x)) - slow).max() < 1e-5


CHOICE = """
import time
import phi3_mlx
from phi3_mlx.models import linear
for clock in ("time", "perf_counter", "monotonic", "process_time"):
    setattr(time, clock, None)  # whoever reads one fails
print(linear.dequantizing_pays(4, 1 << 20))
"""


def chosen(**environment):
    command = [sys.executable, "-c", CHOICE]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout


def test_two_processes_choose_alike_and_read_no_clock():
    assert chosen() == chosen() == f"{linear.dequantizing_pays(4, 1 << 20)}\n"


def test_the_choice_follows_the_blas(monkeypatch):
    large = 1 << 20
    monkeypatch.setattr(linear.blas, "is_fast", lambda: True)
    assert linear.dequantizing_pays(4, large) == linear.DEQUANTIZED_ROWS[4]
    assert 1 < linear.dequantizing_pays(2, large) < linear.dequantizing_pays(4, large)
    few = linear.DEQUANTIZED_ROWS[2]
    assert [linear.dequantizes(few, large, {"bits": 4}, itemsize, False) for itemsize in (2, 4)] == [True, False]
    monkeypatch.setattr(linear.blas, "is_fast", lambda: False)
    assert linear.dequantizing_pays(4, large) > 10**6


@pytest.mark.skipif(not mlx_blas._reference_blas(), reason="MLX has another BLAS here")
def test_without_a_fast_blas_weights_stay_packed():
    assert int(chosen(PHI3_MLX_BLAS="off", LD_PRELOAD="")) > 10**6


@pytest.mark.parametrize(
    ("shape", "dtype", "from_rows"),
    [
        ((64, 1024), mx.float32, 8),
        ((64, 1024), mx.bfloat16, 2),
        ((64, 1024), mx.float16, 2),
        ((64, 64), mx.float32, 65),  # so small that dequantizing costs more than it saves
        ((64, 64), mx.bfloat16, 9),
        ((128, 64), mx.float32, 33),
    ],
    ids=str,
)
@pytest.mark.parametrize("output", [False, True], ids=["a layer", "an output embedding"])
def test_from_some_rows_on_a_weight_is_dequantized(shape, dtype, from_rows, output, monkeypatch):
    monkeypatch.setattr(linear.blas, "is_fast", lambda: True)
    dequantized = []
    monkeypatch.setattr(
        linear, "dequantized_product", lambda weight, *a, **k: lambda x: dequantized.append(len(x)) or x
    )
    packed = (linear.Embedding(*shape) if output else linear.Linear(*shape[::-1], bias=False)).to_quantized(32, 4)
    packed.set_dtype(dtype)
    for rows in (1, from_rows - 1, from_rows):
        (packed.as_linear if output else packed)(mx.zeros((rows, shape[1]), dtype))
    assert dequantized == [from_rows]


def test_the_plan_asks_what_the_layers_ask(monkeypatch):
    monkeypatch.setattr(linear.blas, "is_fast", lambda: True)
    packing = {"group_size": 32, "bits": 4}
    assert [linear.dequantizes(rows, 64 * 64, packing, 4, False) for rows in (64, 65)] == [False, True]
    assert not linear.dequantizes(65, 64 * 64, None, 4, False)
    assert not linear.dequantizes(65, 64 * 64, packing, 4, True)


def test_on_a_gpu_weights_stay_packed(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert linear.dequantizing_pays(4, 1 << 20) > 10**6


def test_a_loaded_model_has_these_layers():
    model, _ = load("tiny")
    packed = [module for module in model.modules() if hasattr(module, "bits")]
    assert packed
    assert all(type(module).__module__ == linear.__name__ for module in packed)
