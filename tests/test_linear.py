"""The two ways to multiply by packed weights give the same numbers, and the choice follows what was timed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

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
        monkeypatch.setattr(linear, "unpacking_pays", lambda threshold=threshold: threshold)
        assert np.abs(np.array(packed(x)) - expected).max() < 1e-4
        gradient = mx.grad(lambda x: mx.sum(mx.square(packed(x))))(x)
        assert np.abs(np.array(gradient) - 2 * expected @ np.array(weight.astype(mx.float32))).max() < 1e-3


def test_a_large_weight_is_unpacked_slice_by_slice(monkeypatch):
    """Forward and backward in memory of some slices, which a whole unpacked weight would exceed."""
    monkeypatch.setattr(linear, "unpacking_pays", lambda: 1)
    packed = linear.Linear(1024, 8192, bias=False).to_quantized(64, 4)  # 33.6 MB unpacked
    x = mx.random.normal((4, 1024))
    mx.eval(packed.parameters(), x)
    for product in (packed, mx.grad(lambda x: packed(x).sum())):
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        mx.eval(product(x))
        assert mx.get_peak_memory() - held < 5 * linear.SLICE * linear.unpacking_bytes(4, 4)


def test_the_output_embedding_too(monkeypatch):
    packed = linear.Embedding(50, 64).to_quantized(32, 4)
    x = mx.random.normal((20, 64), key=mx.random.key(0))
    monkeypatch.setattr(linear, "unpacking_pays", lambda: 10**9)
    slow = np.array(packed.as_linear(x))
    monkeypatch.setattr(linear, "unpacking_pays", lambda: 1)
    assert np.abs(np.array(packed.as_linear(x)) - slow).max() < 1e-5


def test_the_choice_follows_the_clock(monkeypatch):
    def timed(*seconds):
        it = iter(seconds)
        monkeypatch.setattr(linear, "_seconds", lambda function: next(it))
        return linear._measured.__wrapped__()

    assert timed(32.0, 3.2, 9.0) == 10  # a packed row 1.0, a plain row 0.1, unpacking 9.0
    assert timed(1.0, 2.0, 0.1) > 10**6  # a BLAS slower than the packed product is never used
    assert timed(32.0, 3.2, 0.001) == 2  # one row is always multiplied as it is


def test_on_a_gpu_weights_stay_packed(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert linear.unpacking_pays() > 10**6


def test_a_loaded_model_has_these_layers():
    model, _ = load("tiny")
    packed = [module for module in model.modules() if hasattr(module, "bits")]
    assert packed
    assert all(type(module).__module__ == linear.__name__ for module in packed)
