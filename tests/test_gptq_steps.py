"""What GPTQ does beside rounding columns: targets that keep the source's outputs, and a refit that never loses."""

import itertools
import re
import threading
from unittest.mock import Mock

import mlx.core as mx
import moe_models
import numpy as np
import pytest
from quality_models import RandomSource, Shallow, arrays_of, divergence, random_ids, stories, trained, write_model
from test_distill import SOURCES
from test_gptq import inputs
from test_phi_moe_tools import VOCAB

from phi3_mlx.conversion import calibrating, planning, targets
from phi3_mlx.conversion.calibrating import GptqSteps, MatrixFit, Stored, calibrated
from phi3_mlx.conversion.fits import fits_markdown
from phi3_mlx.conversion.gptq import _costs, _grid, better_rows, dequantized_matrix, gptq, hessian_of, refit
from phi3_mlx.conversion.layerwise import EMBEDDING, Inputs, LayerStream, Passage
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.refit import _best_codes, _best_grid, in_turn
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.sensitivity import SENSITIVITY_WINDOW, measure
from phi3_mlx.conversion.sources import Blocks
from phi3_mlx.conversion.targets import DAMPINGS, moments_of, rounding_damping, target_of
from phi3_mlx.conversion.texts import CALIBRATION_TOKENS, bundled, calibration, windows
from phi3_mlx.models.hooks import get_layer
from phi3_mlx.store.checkpoint import read_model

WIDTH, FITTED_WINDOW = 64, 64
MOE = {**VOCAB, "num_local_experts": 4}


def moved(x, seed, amount=0.2):
    """Inputs that a packed model gives instead of `x`: what was lost depends on them."""
    mixing = np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1])) / np.sqrt(x.shape[1])
    return (x + amount * x @ mixing).astype(np.float32)


def moments(before, after, stream=None, weight=()):
    streams = None if stream is None else tuple(map(mx.array, stream))
    return moments_of([[Inputs(mx.array(before), mx.array(after), streams)]], weight)[0]


def test_a_target_is_the_damped_least_squares_on_the_packed_inputs():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(9, WIDTH)).astype(np.float32)
    x = inputs(600, WIDTH)
    packed = moved(x, 1)
    target = target_of(mx.array(weight), moments(x[:400], packed[:400]), moments(x[400:], packed[400:]))
    assert target.damping in DAMPINGS
    hessian = packed.astype(np.float64).T @ packed
    damped = hessian + target.damping * np.diag(hessian).mean() * np.eye(WIDTH)
    # min |W x - V x'|^2 + d |V - W|^2
    right = weight @ x.astype(np.float64).T @ packed + weight @ (damped - hessian)
    np.testing.assert_allclose(target.weight, np.linalg.solve(damped, right.T).T, rtol=1e-2, atol=2e-3)
    errors = [np.square(x @ weight.T - packed @ np.array(matrix).T).sum() for matrix in (target.weight, weight)]
    assert errors[0] < 0.5 * errors[1]


def test_a_target_makes_up_for_the_stream_that_its_outputs_are_added_to():
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(9, WIDTH)).astype(np.float32)
    x = inputs(600, WIDTH)
    packed, lost = moved(x, 1), 0.3 * rng.normal(size=(WIDTH, 9)).astype(np.float32)
    before = (rng.normal(size=(600, 9)) * rng.uniform(1, 9, (600, 1))).astype(np.float32)  # tokens of many lengths
    after = before + x @ lost  # what layers before did to the stream shows in the inputs
    parts = [
        moments(x[rows], packed[rows], (before[rows], after[rows]), [mx.array(weight)])
        for rows in (slice(400), slice(400, None))
    ]
    target = target_of(mx.array(weight), *parts)
    share = 1 / np.linalg.norm(before, axis=1, keepdims=True).astype(np.float64)
    hessian = (packed * share).T @ (packed * share)
    damped = hessian + target.damping * np.diag(hessian).mean() * np.eye(WIDTH)
    # min |R + W x - R' - V x'|^2 / |R|^2 + d |V - W|^2
    right = (before - after + x @ weight.T).T @ (packed * share**2) + weight @ (damped - hessian)
    np.testing.assert_allclose(target.weight, np.linalg.solve(damped, right.T).T, rtol=1e-2, atol=2e-3)
    wanted, given = ((before + x @ weight.T) * share)[400:], after[400:] + packed[400:] @ np.array(target.weight).T
    expected = np.linalg.norm(wanted - given * share[400:]) / np.linalg.norm(wanted)
    assert parts[1].error(mx.array(weight), target.weight) == pytest.approx(expected, rel=1e-3)
    alone = target_of(mx.array(weight), moments(x[:400], packed[:400]), moments(x[400:], packed[400:])).weight
    assert expected < 0.5 * parts[1].error(mx.array(weight), alone)


@pytest.mark.parametrize("name", ["mini-4k", "small"])
def test_outputs_are_added_to_the_stream_that_is_beside_the_inputs(name):
    """To the layer's own input by attention, to what comes of that by the feed-forward part, in both models."""
    source = RandomSource(scale=0.1, **SOURCES[name])
    stream = LayerStream(source)
    original = stream.layer(0)
    packed = stream.twin(original, 0)
    before = stream.embed(mx.array(random_ids(64, source.config.vocab_size)).reshape(2, 32))
    hidden = before + 0.1 * mx.random.normal(before.shape, key=mx.random.key(0))
    after = [stream.run(original, before), stream.run(packed, hidden)]
    passages = Passage(original, before), Passage(packed, hidden)
    for path in stream.linears:
        ((part,),) = stream.pairs(*passages, path)
        layer = get_layer(original, path)
        if path.endswith(("o_proj", "dense")):
            assert mx.array_equal(part.stream[0], before.flatten(0, -2))
            assert mx.array_equal(part.stream[1], hidden.flatten(0, -2))
            middle = [flow + layer(x) for x, flow in zip(part[:2], part.stream, strict=True)]
        elif path.endswith("down_proj"):
            for x, flow, reached, end in zip(part[:2], part.stream, middle, after, strict=True):
                np.testing.assert_allclose(flow, reached, atol=1e-4)
                np.testing.assert_allclose(flow + layer(x), end.flatten(0, -2), atol=1e-4)
        else:
            assert part.stream is None
    packed.self_attn.o_proj = packed.self_attn.dense = lambda x: 0.0 * x  # what comes later may still change
    for passage in passages:
        assert len(passage.mixed) == len(passage.parts) == 1
        np.testing.assert_allclose(stream.after(passage), stream.run(passage.layer, passage.hidden), atol=1e-4)


def test_a_target_that_does_not_carry_over_is_not_taken():
    """What happened to the inputs of the rows that are fitted happens to no other: W stays."""
    weight = mx.random.normal((9, WIDTH), key=mx.random.key(0))
    x = inputs(600, WIDTH)
    target = target_of(weight, moments(x[:400], moved(x[:400], 1)), moments(x[400:], x[400:]))
    assert target.damping is None
    assert mx.array_equal(target.weight, weight)


def test_the_damping_is_the_best_for_the_rows_held_out():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(9, WIDTH)).astype(np.float32)
    for tokens, noise in ((80, 1.0), (4000, 0.0)):
        x = inputs(tokens + 500, WIDTH)
        packed = moved(x, 1) + noise * rng.normal(size=x.shape).astype(np.float32)
        fitted, held_out = moments(x[:tokens], packed[:tokens]), moments(x[tokens:], packed[tokens:])
        hessian, shift = np.array(fitted.hessian, np.float64), np.array(fitted.shift, np.float64)
        errors = {None: np.square((x[tokens:] - packed[tokens:]) @ weight.T).sum()}
        for damping in DAMPINGS:
            damped = hessian + damping * np.diag(hessian).mean() * np.eye(WIDTH)
            matrix = weight + np.linalg.solve(damped, (weight @ shift).T).T
            errors[damping] = np.square(x[tokens:] @ weight.T - packed[tokens:] @ matrix.T).sum()
        found = target_of(mx.array(weight), fitted, held_out).damping
        assert errors[found] <= 1.001 * min(errors.values())


@pytest.mark.parametrize(("tokens", "start"), [*itertools.product((40, 4000), (0, 3, len(DAMPINGS) - 1))])
def test_roundings_damping_is_the_best_for_the_rows_held_out(tokens, start, monkeypatch):
    """Wherever the search begins: much of it where the text is short, little where it is long."""
    weight = mx.random.normal((70, WIDTH), key=mx.random.key(0))
    x = inputs(tokens + 500, WIDTH)
    fitted, held_out = moments(x[:tokens], x[:tokens]), moments(x[tokens:], x[tokens:])
    packing = {"group_size": 32, "bits": 3, "mode": "affine"}
    losses = {}
    for damping in DAMPINGS:
        parts = gptq(weight, fitted.hessian, packing, mx.float32, 1, damping)
        losses[damping] = float(((x[tokens:] @ (dequantized_matrix(parts, packing) - weight).T) ** 2).sum())
    monkeypatch.setattr(targets, "_USUAL_ROUNDING", DAMPINGS[start] * tokens / WIDTH)
    found = rounding_damping(weight, weight, fitted, held_out, packing, mx.float32)
    assert losses[found] <= 1.03 * min(losses.values())
    assert losses[found] < (0.7 if tokens == 40 else 1.001) * losses[min(DAMPINGS)]
    assert (found > min(DAMPINGS)) == (tokens == 40)


def test_without_rows_held_out_roundings_damping_is_the_usual_for_so_many_tokens():
    weight = mx.random.normal((70, WIDTH), key=mx.random.key(0))
    packing, nothing = {"group_size": 32, "bits": 3, "mode": "affine"}, moments(inputs(0, WIDTH), inputs(0, WIDTH))
    found = []
    for tokens in (1, 8, 256, 10**4):
        x = inputs(tokens, WIDTH)
        found.append(rounding_damping(weight, weight, moments(x, x), nothing, packing, mx.float32))
    assert found == [30.0, 30.0, 1.0, 0.03]


def test_rounding_is_judged_by_what_it_stands_for():
    """By the source's outputs on the packed inputs, not by the target's own."""
    weight = mx.random.normal((70, WIDTH), key=mx.random.key(0))
    x = inputs(900, WIDTH)
    fitted, held_out = (moments(x[rows], moved(x[rows], 1)) for rows in (slice(600), slice(600, None)))
    packing, tried = {"group_size": 32, "bits": 4, "mode": "affine"}, []
    target = target_of(weight, fitted, held_out).weight

    def worse(change, wanted):
        tried.append(float((change * (change @ held_out.hessian) - 2 * change * wanted).sum()))
        return tried[-1]

    judge = Mock(wraps=held_out, worse=worse)
    rounding_damping(weight, target, fitted, judge, packing, mx.float32)
    packed = moved(x[600:], 1)
    lost = np.square((x[600:] - packed) @ np.array(weight).T).sum()
    assert len(tried) >= 2
    assert lost + min(tried) < 0.2 * lost  # the target takes away most of what was lost


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_refitting_loses_less_in_every_row(bits, dtype):
    """With scales and biases as they are stored; the more sweeps, the less."""
    weight = mx.random.normal((24, 128), key=mx.random.key(bits))
    weight[0] = 0.25  # all codes of a group alike: no scale to find
    hessian = hessian_of([mx.array(inputs(400, 128))])
    damped = np.array(hessian, np.float64) + 0.01 * np.diag(np.array(hessian)).mean() * np.eye(128)
    packing = {"group_size": 32, "bits": bits, "mode": "affine"}
    losses = []
    for sweeps in (0, 1, 2, 4):
        parts = gptq(weight, hessian, packing, dtype, sweeps)
        assert [part.dtype for part in parts] == [mx.uint32, dtype, dtype]
        assert mx.isfinite(parts[1]).all()
        left = np.array(dequantized_matrix(parts, packing) - weight, np.float64)
        losses.append(((left @ damped) * left).sum(axis=1))
    for worse, better in itertools.pairwise(losses):
        assert (better <= worse * (1 + 1e-4) + 1e-6).all()
    assert losses[1][1:].sum() < 0.97 * losses[0][1:].sum()
    assert losses[3][1:].sum() < losses[2][1:].sum() < losses[1][1:].sum()


@pytest.mark.parametrize("count", [8, 16, 24, 40])
@pytest.mark.parametrize("told", [True, False], ids=["from codes", "from what was wanted"])
def test_codes_follow_the_steps_of_all_before_them(count, told):
    """However they are put together: each is what is wanted of it when those before it are chosen, rounded."""
    rng = np.random.default_rng(count)
    wanted, ties = rng.uniform(-2, 17, (count, 5)), rng.normal(size=(count, count)) / 8
    before = rng.integers(0, 16, (count, 5)).astype(float)
    codes, steps = in_turn(
        *(mx.array(x.astype(np.float32)) for x in (wanted, ties)), 4, mx.array(before) if told else None
    )
    expected, left = np.zeros((count, 5)), wanted.copy()
    for k in range(count):
        expected[k] = np.clip(np.round(left[k]), 0, 15)
        step = expected[k] - (before[k] if told else left[k])
        np.testing.assert_allclose(steps[k], step, atol=1e-4)
        left[k + 1 :] -= np.outer(ties[k, k + 1 :], step)
    np.testing.assert_array_equal(codes, expected)


def test_a_grids_costs_follow_its_shapes():
    """They are compiled once, in each thread for the first shape that it sees: here for matrices of one output."""
    rng = np.random.default_rng(0)
    shapes, costs = [(32, 1), (32, 8), (64, 1), (128, 5)], []
    given = [
        [rng.normal(size=shape), rng.uniform(1, 2, (shape[0], 1)), rng.uniform(0.1, 0.2, shape[1]), np.zeros(shape[1])]
        for shape in shapes
    ]

    def compute():
        for bits, arrays in enumerate(given, 2):
            made = _costs(*(mx.array(x.astype(np.float32)) for x in arrays), mx.array(2.0**bits - 1))
            costs.append(np.array(made))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert [made.shape for made in costs] == shapes
    for bits, (made, (group, importance, scale, bias)) in enumerate(zip(costs, given, strict=True), 2):
        rounded_to = np.clip(np.round((group - bias) / scale), 0, 2**bits - 1) * scale + bias
        np.testing.assert_allclose(made, importance * (group - rounded_to) ** 2, rtol=1e-3, atol=1e-4)


def test_a_grid_takes_the_memory_of_a_few_groups():
    """Not that of all ranges that are tried, which are 27."""
    group = mx.random.normal((64, 8192))
    mx.eval(group)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(_grid(group, mx.ones((64, 1)), 4, mx.bfloat16))
    assert mx.get_peak_memory() - held < 12 * group.nbytes


def test_scales_are_refitted_to_the_codes_as_they_are_then():
    """What is left to gain, H (W - Q), is that of the new codes."""
    block = hessian_of([mx.array(inputs(50, 8))])
    codes, scale = mx.array(np.random.default_rng(0).integers(0, 16, (8, 3)).astype(np.float32)), mx.array([0.5, 1, 2])
    columns = codes * scale + 3 * mx.random.normal((8, 3), key=mx.random.key(0))
    better, left = _best_codes(codes, block @ (columns - codes * scale), block, scale, 4)
    assert not mx.array_equal(better, codes)
    expected = np.array(block @ (columns - better * scale))
    np.testing.assert_allclose(left, expected, atol=1e-4 * np.abs(np.array(block @ columns)).max())


def test_a_refitted_scale_keeps_its_sign():
    """By least squares it would turn around here, or be 0, which leaves the codes no meaning."""
    codes, scale, bias = mx.array([[0.0, 0], [1, 1], [2, 2], [3, 3]]), mx.ones(2), mx.zeros(2)
    for desired in ([[3.0, 0], [2, 1], [1, 2], [0, 3.5]], [[1.5, 0], [1.5, 1], [1.5, 2], [1.5, 3.5]]):
        pull = mx.array(desired) - codes
        new_scale, new_bias = _best_grid(codes, pull, mx.eye(4), scale, bias, mx.float32)
        assert (float(new_scale[0]), float(new_bias[0])) == (1.0, 0.0)
        assert float(new_scale[1]) == pytest.approx(1.15)


def test_rounding_is_for_all_rows_of_the_text(monkeypatch):
    """Those held out chose its damping, and then count like the others."""
    source = RandomSource(vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=32)
    seen = {}

    def spy(weight, hessian, *rest):
        seen[weight.shape] = hessian
        return gptq(weight, hessian, *rest)

    monkeypatch.setattr(calibrating, "gptq", spy)
    layout, steps = Layout.of(source, uniform(8, 32)), GptqSteps(False, False, False, 0)
    ids = random_ids(4 * 32, 64)
    arrays = arrays_of(layout, calibrated(source, layout, ids, window=32, steps=steps))
    name = "model.layers.0.self_attn.qkv_proj"
    table = mx.dequantize(*(arrays[f"model.embed_tokens.{part}"] for part in ("weight", "scales", "biases")), 32, 8)
    rows = LayerStream(source).layer(0).input_layernorm(table[mx.array(ids)])
    expected = np.array(hessian_of([rows]))
    found = np.array(seen[source.tensors[f"{name}.weight"].shape])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def fitted_to_stories(source, tokenizer, layout, steps=None):
    ids = tokenizer.encode(stories("calibration"))[:1024]
    calibration = calibrated(source, layout, ids, window=FITTED_WINDOW, steps=steps)
    return calibration, arrays_of(layout, calibration)


@pytest.fixture(scope="module")
def fitted():
    """The bundled model's first layers in 3 bits, fitted to stories: (source, tokenizer, calibration, layout, arrays).

    Two of its six layers are enough: in the second, inputs and the stream are what rounding the first has left.
    """
    model, tokenizer = trained()
    model = Shallow(model, 2)
    layout = Layout.of(model, uniform(3, 64))
    calibration, arrays = fitted_to_stories(model, tokenizer, layout)
    return model, tokenizer, calibration, layout, arrays


@pytest.mark.long
def test_gptq_beats_rounding_on_trained_weights(fitted, tmp_path):
    """At the same bits, on a text that it was not calibrated on; at 4 bits so short a text is too short to tell."""
    source, tokenizer, _, layout, arrays = fitted
    reference = read_model(write_model(tmp_path / "reference", source, None, rounded(source)))
    plain = write_model(tmp_path / "round", source, layout.recipe, rounded(source))
    better = write_model(tmp_path / "gptq", source, layout.recipe, lambda entry: [arrays[n] for n in entry.stored])
    kl = [divergence(reference, path, tokenizer, stories("sample")) for path in (plain, better)]
    assert kl[1] < 0.9 * kl[0]


def errors_by_layer(model, layout, arrays, rows):
    """The squared error of a text's hidden states behind each layer of the packed model."""
    stream = LayerStream(model)

    def matrix(path):
        packing = layout.packings[f"{path}.weight"]
        return dequantized_matrix([arrays[f"{path}.{part}"] for part in ("weight", "scales", "biases")], packing)

    before, hidden = stream.embed(rows), stream.embedded(matrix(EMBEDDING)[rows])
    errors = []
    for i in range(stream.config.num_hidden_layers):
        original = stream.layer(i)
        packed = stream.twin(original, i)
        for path in stream.linears:
            get_layer(packed, path).weight = matrix(f"model.layers.{i}.{path}")
        before, hidden = stream.run(original, before), stream.run(packed, hidden)
        errors.append(float(((before - hidden) ** 2).sum()))
    return errors


def test_no_layers_output_error_rises(fitted):
    """On a text that was not read, behind every layer: least with all steps, whatever they do to the text that was."""
    source, tokenizer, _, layout, with_all = fitted
    unseen = windows(tokenizer.encode(stories("sample")), FITTED_WINDOW)
    with_some = [
        fitted_to_stories(source, tokenizer, layout, steps)[1]
        for steps in (GptqSteps(targets=False, damping=False, sweeps=0), GptqSteps(targets=False))
    ]
    plain, refitted, whole = (errors_by_layer(source, layout, arrays, unseen) for arrays in (*with_some, with_all))
    for better, worse in ((refitted, plain), (whole, refitted)):
        assert all(error <= 1.02 * before for error, before in zip(better, worse, strict=True))
        assert better[-1] < worse[-1]
    assert whole[-1] < 0.7 * plain[-1]


def lost(weight, parts, hessian, packing):
    """What each row of a packed weight loses for inputs of that hessian, as refitting counts it."""
    damped = np.array(hessian, np.float64)
    damped += 0.01 * np.diag(damped).mean() * np.eye(len(damped))
    left = np.array(dequantized_matrix(parts, packing) - weight.astype(mx.float32), np.float64)
    return ((left @ damped) * left).sum(axis=1)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_refitting_may_begin_from_what_is_stored(dtype):
    """A change far smaller than a step: no row loses more than if nothing changed. mlx writes scales below 0, too."""
    packing = {"group_size": 32, "bits": 4, "mode": "affine"}
    stored = list(mx.quantize(mx.random.normal((24, 128), key=mx.random.key(0)).astype(dtype), **packing))
    assert (stored[1] < 0).any()
    assert (stored[1] > 0).any()
    stored[1][3, 2], stored[2][3, 2] = 0, 0.5  # a group of one value
    hessian = hessian_of([mx.array(inputs(400, 128))])
    change = mx.random.normal((24, 3), key=mx.random.key(1)) @ mx.random.normal((3, 128), key=mx.random.key(2))
    weight = dequantized_matrix(stored, packing) + 0.015 * change
    made = refit(weight, hessian, stored, packing, 2)
    assert [part.dtype for part in made] == [mx.uint32, dtype, dtype]
    assert (made[1] != 0).all()
    before, after = (lost(weight, parts, hessian, packing) for parts in (stored, made))
    assert (after <= before * (1 + 1e-3)).all()
    assert after.sum() < 0.9 * before.sum()
    assert gptq_loses_more(weight, hessian, packing, dtype, before)
    assert all(mx.array_equal(a, b) for a, b in zip(refit(weight, hessian, stored, packing, 0), stored, strict=True))


def gptq_loses_more(weight, hessian, packing, dtype, before):
    """Whether a new grid would cost more than the whole change."""
    return lost(weight, gptq(weight, hessian, packing, dtype), hessian, packing).sum() > before.sum()


def test_refitting_is_what_follows_columns():
    weight, packing = mx.random.normal((9, 64), key=mx.random.key(0)), {"group_size": 32, "bits": 3, "mode": "affine"}
    hessian = hessian_of([mx.array(inputs(200, 64))])
    columns = gptq(weight, hessian, packing, mx.bfloat16, 0)
    for made, whole in zip(
        refit(weight, hessian, columns, packing), gptq(weight, hessian, packing, mx.bfloat16), strict=True
    ):
        assert mx.array_equal(made, whole)


def test_each_row_is_the_better_of_two():
    weight, packing = mx.random.normal((20, 64), key=mx.random.key(0)), {"group_size": 32, "bits": 2, "mode": "affine"}
    hessian = hessian_of([mx.array(inputs(200, 64))])
    noise = [0.3 * mx.random.normal(weight.shape, key=mx.random.key(seed)) for seed in (1, 2)]
    several = [list(mx.quantize(weight + shift, **packing)) for shift in noise]
    losses = [lost(weight, parts, hessian, packing) for parts in several]
    assert 0 < (losses[0] < losses[1]).sum() < 20
    best = lost(weight, better_rows(weight, hessian, *several, packing), hessian, packing)
    np.testing.assert_allclose(best, np.minimum(*losses), rtol=1e-3)


@pytest.mark.long
def test_experts_too_begin_from_what_is_stored(tmp_path, monkeypatch):
    tensors = moe_models.hugging_face(moe_models.random_weights(MOE, near=0.5))
    source = open_source(moe_models.write(tmp_path / "source", MOE, tensors))
    layout = Layout.of(source, uniform(4, 32))
    name = next(name for name in layout.packings if len(source.tensors[name].shape) == 3)
    stored = list(mx.quantize(source.read(name), **layout.packings[name]))
    seen = []

    def spy(weight, hessian, ours, theirs, packing, damping):
        seen.append(theirs)
        return better_rows(weight, hessian, ours, theirs, packing, damping)

    def refitted(weight, hessian, parts, packing, sweeps, damping):
        return list(parts)

    monkeypatch.setattr(calibrating, "better_rows", spy)
    monkeypatch.setattr(calibrating, "refit", refitted)
    start = {name: Blocks(layout.packings[name], lambda: stored)}
    arrays_of(
        layout, calibrated(source, layout, [i % 3000 for i in range(5 * 64)], window=64, stored=Stored({}, start))
    )
    assert len(seen) == len(stored[0])
    for expert, parts in enumerate(seen):
        assert all(mx.array_equal(a, b[expert]) for a, b in zip(parts, stored, strict=True))


def test_experts_of_few_tokens_are_rounded_for_what_the_others_get():
    many, few = inputs(400, WIDTH), inputs(3, WIDTH, seed=1)
    none = moments(many[:0], many[:0])
    own = [moments(many, moved(many, 2)), moments(few, few), none]
    pooled = calibrating._pooled(own)
    assert mx.array_equal(pooled[0].hessian, own[0].hessian)
    np.testing.assert_allclose(pooled[2].hessian, (own[0].hessian + own[1].hessian) * 16 / 403, rtol=1e-4)
    assert mx.abs(pooled[1].hessian - own[1].hessian).max() > 0
    assert not mx.any(calibrating._pooled([none, none])[0].hessian).item()


def test_experts_of_both_models_get_the_same_tokens(tmp_path):
    """Otherwise rows of different tokens would be taken for pairs."""
    tensors = moe_models.hugging_face(moe_models.random_weights(MOE, near=0.5))
    stream = LayerStream(open_source(moe_models.write(tmp_path / "source", MOE, tensors)))
    original = stream.layer(0)
    packed = stream.twin(original, 0)
    hidden = stream.embed(mx.array([list(range(5, 37))] * 3))
    away = hidden + 0.5 * mx.random.normal(hidden.shape, key=mx.random.key(0))
    router = stream.config.router
    for path in stream.linears:
        own = next(stream.inputs(packed, path, away))
        (pairs,) = stream.pairs(Passage(original, hidden), Passage(packed, away), path)
        assert [len(a) for a, _, _ in pairs] == [len(b) for _, b, _ in pairs] == [len(rows) for rows in own]
        for (_, b, _), rows in zip(pairs, own, strict=True):
            assert mx.array_equal(b, rows)
        if path != router:
            (pairs,) = stream.pairs(Passage(original, away), Passage(packed, away), path)
            assert all(mx.array_equal(a, b) for a, b, _ in pairs)
    assert get_layer(original, router) is not get_layer(packed, router)


@pytest.mark.long
def test_the_errors_of_an_expert_are_on_its_own_tokens(tmp_path, monkeypatch):
    """Not on those that made up for them, which other weights of the source's answered."""
    tensors = moe_models.hugging_face(moe_models.random_weights(MOE, near=0.5))
    source = open_source(moe_models.write(tmp_path / "source", MOE, tensors))
    layout = Layout.of(source, uniform(4, 32))
    seen = {}
    original = calibrating.Calibration._packed

    def spy(self, path, packing, dtype, weight, fitted, held_out, judges, start):
        parts, fit = original(self, path, packing, dtype, weight, fitted, held_out, judges, start)
        assert fit.rounded == judges.error(weight, dequantized_matrix(parts, packing))
        seen.setdefault(path, []).append((held_out.tokens, judges.tokens, fit.rounded))
        return parts, fit

    monkeypatch.setattr(calibrating.Calibration, "_packed", spy)
    calibration = calibrated(source, layout, [i % 3000 for i in range(7 * 64)], window=64)
    arrays_of(layout, calibration)
    for fit in calibration.fits:
        held_out, judges, errors = zip(*seen[fit.path], strict=True)
        if len(judges) > 1:
            assert sum(judges) == 64 * MOE["num_experts_per_tok"]
            assert min(held_out) >= calibrating.ENOUGH_TOKENS * 96 > min(judges)
            assert fit.few > 0
        assert fit.rounded == pytest.approx(sum(errors) / len(errors))
        assert 0 <= min(errors) <= max(errors) < 1, fit.path


@pytest.mark.long
def test_a_plan_counts_what_every_expert_gets(tmp_path):
    tensors = moe_models.hugging_face(moe_models.random_weights(MOE, near=0.5))
    source = open_source(moe_models.write(tmp_path / "source", MOE, tensors))
    layout = Layout.of(source, uniform(4, 32))
    ids = [i % 3000 for i in range(4 * calibrating.GPTQ_WINDOW)]
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    arrays_of(layout, calibrated(source, layout, ids))
    peak = mx.get_peak_memory() - before
    # Beside the arrays kept by this test, what is planned is enough and no more than twice too much.
    assert peak - layout.nbytes < planning._gptq(source, len(ids)) < 2 * peak, (peak, planning._gptq(source, len(ids)))


def test_a_plan_of_measuring_counts_all_experts(tmp_path):
    """They are rounded at once, while one of their matrices is small."""
    raw = {**MOE, "vocab_size": 512, "intermediate_size": 256, "num_local_experts": 16}
    tensors = moe_models.hugging_face(moe_models.random_weights(raw, near=0.5))
    source = open_source(moe_models.write(tmp_path / "source", raw, tensors))
    ids = [i % 500 for i in range(2 * SENSITIVITY_WINDOW)]
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    measure(source, ids, group_size=32, bits=(2,))
    peak = mx.get_peak_memory() - before
    assert peak < planning._measuring(source, len(ids), False) < 2 * peak, peak


def test_a_plan_of_bits_and_rounding_is_that_of_the_larger(monkeypatch):
    model, _ = trained()
    layout, planned = Layout.of(model, uniform(4, 64)), []
    monkeypatch.setattr(planning.plan, "check_room", lambda what, parts, way: planned.append(parts))
    monkeypatch.setattr(planning, "_measuring", lambda source, tokens, rounds: 10**9)
    for gptq_bytes in (10**8, 10**10):
        monkeypatch.setattr(planning, "_gptq", lambda source, tokens, size=gptq_bytes: size)
        for measures, rounds in ((True, True), (True, False), (False, True), (False, False)):
            planning.check_conversion(model, model, layout, 1, measures=measures, rounds=rounds)
    found = [parts["a layer and a text"] for parts in planned]
    assert found == [10**9, 10**9, 10**8, 0, 10**10, 10**9, 10**10, 0]


def runs(text, length=8):
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_what_weights_are_fitted_to_is_long_and_has_nothing_of_the_sample():
    text, sample = calibration(), bundled("sample")
    assert not runs(text) & runs(sample)
    assert len(runs(sample)) > 1000
    assert len(re.findall(r"\w+", text)) > 18_000  # of which every tokenizer makes 24,000 tokens
    assert len(trained()[1].encode(text)) > CALIBRATION_TOKENS > 24_576
    assert len(text.encode()) < 150_000


def test_each_matrix_says_what_fitting_it_did(fitted):
    """Errors on rows held out: of the source's matrix, which rounding before spoilt, of the target, of each step."""
    _, _, calibration, layout, _ = fitted
    assert [f"{fit.path}.weight" for fit in calibration.fits] == list(layout.packings)[1:]
    assert all(fit.target < fit.inherited for fit in calibration.fits if fit.damping is not None)
    assert all(fit.target == fit.inherited for fit in calibration.fits if fit.damping is None)
    assert all(0 < fit.target < fit.rounded < 0.5 for fit in calibration.fits)
    means = [sum(getattr(fit, step) for fit in calibration.fits) for step in ("nearest", "columns", "rounded")]
    assert means == sorted(means, reverse=True)
    assert means[2] < 0.97 * means[1] < 0.9 * means[0]
    assert sum(fit.damping is not None for fit in calibration.fits) > len(calibration.fits) // 2
    text = fits_markdown(
        [*calibration.fits, MatrixFit("experts", None, 0.3, 1, 1, 1, 1, 1, few=3)], fitted_kl=0.1, other_kl=0.25
    )
    assert "0.10000 on the beginning of the text" in text
    assert "0.25000 on the report's" in text
    assert "3 of `experts`" in text
    assert "| experts | none | 0.3 | 1.00000 |" in text


def test_an_error_is_that_of_the_outputs():
    weight, other = (np.random.default_rng(i).normal(size=(9, WIDTH)).astype(np.float32) for i in range(2))
    x = inputs(100, WIDTH)
    packed = moved(x, 1)
    found = moments(x, packed, weight=[mx.array(weight)])
    outputs = x @ weight.T
    expected = np.linalg.norm(outputs - packed @ other.T) / np.linalg.norm(outputs)
    assert found.error(mx.array(weight), mx.array(other)) == pytest.approx(expected, rel=1e-4)
