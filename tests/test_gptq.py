"""GPTQ: its codes are those of the definition, its files those of plain rounding, and its errors smaller."""

import itertools
import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import long_after
from quality_models import RandomSource, arrays_of, random_ids, write_model

from phi3_mlx.conversion import calibrating, gptq
from phi3_mlx.conversion.calibrating import calibrated
from phi3_mlx.conversion.gptq import hessian_of, pack_codes
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.sources import to_mlx
from phi3_mlx.errors import CheckpointError, OptionError, PromptError
from phi3_mlx.store.checkpoint import read_model

BITS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_reads_them(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64), dtype=np.uint8)
    packed = mx.array(pack_codes(codes, bits))
    np.testing.assert_array_equal(mx.dequantize(packed, mx.ones((3, 2)), mx.zeros((3, 2)), 32, bits), codes)


def inputs(tokens, width, seed=0):
    """Inputs whose features depend on each other, as a model's do."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) * rng.uniform(0.1, 2, width)
    return mixed.astype(np.float32)


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product((2, 3, 4), (32, 64))))
def test_codes_are_those_of_the_definition(bits, group_size):
    """Each column is rounded from the values that, given all columns rounded so far, are best for the outputs."""
    width, rows = 128, 9
    weight = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32)
    x = inputs(400, width)
    packing = {"group_size": group_size, "bits": bits, "mode": "affine"}
    parts = gptq.gptq(mx.array(weight), hessian_of([mx.array(x)]), packing, mx.float32, sweeps=0)
    scales, biases = (np.repeat(np.array(part), group_size, axis=1).astype(np.float64) for part in parts[1:])
    found = np.array(mx.dequantize(parts[0], mx.ones(parts[1].shape), mx.zeros(parts[1].shape), group_size, bits))
    hessian = x.astype(np.float64).T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(width)
    fixed = np.zeros((rows, width))
    wrong = 0
    for j in range(width):
        # The best rest, given columns :j, moves by (what they lost) H_fr H_rr^-1.
        lost = weight[:, :j] - fixed[:, :j]
        best = weight[:, j:] + lost @ hessian[:j, j:] @ np.linalg.inv(hessian[j:, j:])
        code = np.clip(np.round((best[:, 0] - biases[:, j]) / scales[:, j]), 0, 2**bits - 1)
        wrong += (code != found[:, j]).sum()
        fixed[:, j] = found[:, j] * scales[:, j] + biases[:, j]
    assert wrong <= 2, "more than float32 against float64 explains"


def searched(group, costs, top):
    """Scales and biases by the search over ranges as it is described, row by row."""
    found = []
    for row in group:

        def loss(ends, row=row):
            step = (ends[1] - ends[0]) / top
            fixed = np.clip(np.round((row - ends[0]) / step), 0, top) * step + ends[0]
            return (costs * (row - fixed) ** 2).sum()

        low, high = row.min(), row.max()
        ends = min(((low * shrink, high * shrink) for shrink in gptq._SHRINKS), key=loss)
        ends = min([ends, *((ends[0], high * shrink) for shrink in gptq._SHRINKS)], key=loss)
        ends = min([ends, *((low * shrink, ends[1]) for shrink in gptq._SHRINKS)], key=loss)
        found.append(((ends[1] - ends[0]) / top, ends[0]))
    return np.array(found).T


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 32)])
def test_a_grid_is_the_best_for_what_errors_of_its_columns_cost(bits, group_size):
    """An error of a column that no later one makes up for costs 1 / (H^-1)_jj of what is left of H, as in the paper.

    Of the ranges that are tried each row's group has the one of least cost; counting all columns alike gives others.
    """
    width, rows, top = 128, 40, 2**bits - 1
    rng = np.random.default_rng(2)
    weight = rng.standard_t(3, size=(rows, width)).astype(np.float32)
    x = inputs(400, width) * (10 ** rng.uniform(-1.5, 1, width)).astype(np.float32)
    packing = {"group_size": group_size, "bits": bits, "mode": "affine"}
    parts = gptq.gptq(mx.array(weight), hessian_of([mx.array(x)]), packing, mx.float32, sweeps=0)
    scales, biases = (np.array(part).astype(np.float64) for part in parts[1:])
    fixed = np.array(mx.dequantize(*parts, **packing)).astype(np.float64)
    hessian = x.astype(np.float64).T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(width)
    wrong, alike = 0, 0
    for n, j in enumerate(range(0, width, group_size)):
        lost = weight[:, :j] - fixed[:, :j]
        group = (weight[:, j:] + lost @ hessian[:j, j:] @ np.linalg.inv(hessian[j:, j:]))[:, :group_size]
        costs = [1 / np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + group_size)]
        scale, bias = searched(group, np.array(costs), top)
        wrong += (~(np.isclose(scales[:, n], scale, rtol=1e-3) & np.isclose(biases[:, n], bias, rtol=1e-3))).sum()
        alike += np.isclose(scale, searched(group, np.ones(group_size), top)[0], rtol=1e-3).sum()
    assert wrong <= 4, "more than float32 against float64 explains"
    assert alike < 0.7 * rows * width / group_size


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_outputs_are_nearer_than_after_rounding(dtype):
    weight = mx.random.normal((48, 128), key=mx.random.key(3)).astype(dtype)
    x = mx.array(inputs(300, 128))
    for bits in (2, 3, 4, 8):
        packing = {"group_size": 32, "bits": bits, "mode": "affine"}
        parts = gptq.gptq(weight, hessian_of([x[:100], x[100:]]), packing, dtype)
        plain = mx.quantize(weight, **packing)
        assert [part.dtype for part in parts] == [mx.uint32, dtype, dtype]
        assert [part.shape for part in parts] == [part.shape for part in plain]
        errors = []
        for found in (parts, plain):
            back = mx.dequantize(found[0], *(part.astype(mx.float32) for part in found[1:]), **packing)
            errors.append(mx.linalg.norm(x @ (back - weight.astype(mx.float32)).T).item())
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fewer_inputs_than_features_are_no_trouble(tokens):
    weight = mx.random.normal((8, 64), key=mx.random.key(4))
    weight[0] = 0.25  # a row of one value has no range
    x = mx.array(inputs(8, 64))[:tokens]
    x = mx.where(mx.arange(64) < 40, x, 0.0)  # features that never occur
    packing = {"group_size": 64, "bits": 4, "mode": "affine"}
    parts = gptq.gptq(weight, hessian_of([x]), packing, mx.float32)
    back = mx.dequantize(*parts, **packing)
    assert mx.isfinite(back).all()
    np.testing.assert_array_equal(back[0], weight[0])
    assert mx.abs(back - weight).max() < 2


@pytest.mark.parametrize("name", long_after(1, ["mini-4k", "phi-4-mini"]))
def test_what_comes_is_what_was_planned(tmp_path, name):
    source = RandomSource("BF16", **oracle.CONFIGS[name])
    layers = "model.layers"
    recipe = {
        **uniform(4, 64),
        f"{layers}.0.self_attn.qkv_proj": uniform(3, 32),
        f"{layers}.1.mlp.down_proj": uniform(8, 64),
        f"{layers}.2.mlp.gate_up_proj": False,
    }
    layout = Layout.of(source, recipe)
    plan = layout.stored
    arrays = arrays_of(layout, calibrated(source, layout, random_ids(200), window=32))
    assert list(arrays) == list(plan)
    assert all((a.shape, a.dtype) == (plan[n].shape, to_mlx(plan[n].dtype)) for n, a in arrays.items())
    for name in set(arrays) & set(source.tensors):
        if arrays[name].dtype != mx.uint32:
            assert mx.array_equal(arrays[name], source.read(name)), name
    model = read_model(write_model(tmp_path / "model", source, recipe, lambda entry: [arrays[n] for n in entry.stored]))
    assert model.layers[0].self_attn.qkv_proj.bits == 3


def test_inputs_are_those_of_the_packed_layers(monkeypatch):
    """The last layer's down_proj is calibrated on what the packed model gives it, not the original."""
    source = RandomSource(num_hidden_layers=2, scale=0.2)
    ids, recipe = random_ids(64), uniform(2, 64)
    seen = {}
    original = gptq.gptq

    def spy(weight, hessian, *rest):
        seen[len(seen)] = np.array(hessian)
        return original(weight, hessian, *rest)

    monkeypatch.setattr(calibrating, "gptq", spy)
    layout = Layout.of(source, recipe)
    steps = calibrating.GptqSteps(stream=False)  # all tokens weigh alike
    arrays = arrays_of(layout, calibrated(source, layout, ids, window=32, steps=steps))
    model = oracle.make_ours(source.raw_config)
    for name in source.tensors:
        path = name.removesuffix(".weight")
        if name in Layout.of(source, recipe).packings:
            weight = mx.dequantize(*(arrays[f"{path}.{part}"] for part in ("weight", "scales", "biases")), **recipe)
        else:
            weight = source.read(name)
        model.load_weights([(name, weight)], strict=False)
    inside = []
    down = model.layers[1].mlp.down_proj
    model.layers[1].mlp.down_proj = lambda x: (inside.append(x), down(x))[1]
    model(mx.array(ids).reshape(2, 32))
    expected = np.array(hessian_of([inside[0].flatten(0, 1)]))
    down_proj = list(seen)[-2]  # embedding, four a layer, head
    np.testing.assert_allclose(seen[down_proj], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_memory_is_that_of_a_layer_not_of_the_model():
    source = RandomSource("BF16", hidden_size=128, intermediate_size=256, num_hidden_layers=20)
    ids = random_ids(128)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    layout = Layout.of(source, uniform(4, 64))
    rounder = calibrated(source, layout, ids, window=64)
    for entry in layout.entries:
        rounder(entry)
        mx.clear_cache()
    peak = mx.get_peak_memory() - before
    assert source.float_bytes > 10 * source.layer_bytes
    assert peak < 8 * source.layer_bytes, f"{peak / source.layer_bytes:.1f} layers"
    assert all(count <= 2 for count in source.reads.values())


def test_a_model_that_is_not_finite_is_refused():
    class Broken(RandomSource):
        def read(self, name):
            weight = super().read(name)
            return weight * math.inf if name.endswith("0.self_attn.o_proj.weight") else weight

    source = Broken(num_hidden_layers=1)
    layout = Layout.of(source, uniform(4, 64))
    with pytest.raises(CheckpointError, match="not finite"):
        arrays_of(layout, calibrated(source, layout, random_ids(64), window=64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused_not_damped_for_ever(value):
    class Broken(RandomSource):
        def read(self, name):
            weight = super().read(name)
            return weight * value if name.endswith("0.input_layernorm.weight") else weight

    source = Broken(num_hidden_layers=1)
    layout = Layout.of(source, uniform(4, 64))
    with pytest.raises(CheckpointError, match="not finite"):
        arrays_of(layout, calibrated(source, layout, random_ids(320), window=64))


def test_what_cannot_be_calibrated_is_refused_at_once():
    source = RandomSource(num_hidden_layers=1)
    with pytest.raises(OptionError, match="mxfp4"):
        calibrated(source, Layout.of(source, uniform(None, None, "mxfp4")), random_ids(300))
    with pytest.raises(PromptError, match="255 tokens, and 256 are needed"):
        calibrated(source, Layout.of(source, uniform(4, 64)), random_ids(255))
