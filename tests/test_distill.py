"""Distillation: layers begin as they were packed, the best is kept, and a run that was killed ends alike."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import moe_models
import numpy as np
import oracle
import pytest
import small_models
from conftest import ROOT
from mlx.utils import tree_flatten
from quality_models import TRAINED, RandomSource, arrays_of, random_ids, small_directory, stories

from phi3_mlx import convert
from phi3_mlx.conversion import distillation, endtoend, own_text, pipeline, planning, teacher
from phi3_mlx.conversion.calibrating import calibrated
from phi3_mlx.conversion.distillation import distilled
from phi3_mlx.conversion.endtoend import Student
from phi3_mlx.conversion.layerwise import LayerStream
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.options import ConvertOptions
from phi3_mlx.conversion.recipes import left_alone, uniform
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.teacher import Teacher
from phi3_mlx.conversion.trained import TrainedEmbedding, TrainedLinear
from phi3_mlx.engine import machine
from phi3_mlx.errors import MemoryLimitError, OptionError, PromptError
from phi3_mlx.models.experts import Groups, SwitchLinear
from phi3_mlx.models.linear import Linear
from phi3_mlx.store.checkpoint import read_model

PACKING = {"group_size": 64, "bits": 4, "mode": "affine"}


def packed(shape, dtype=mx.bfloat16, seed=0):
    return list(mx.quantize(mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype), **PACKING))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_trained_layer_begins_as_it_was_packed(dtype):
    parts = packed((48, 128), dtype)
    layer, embedding = TrainedLinear(Linear(128, 48, bias=False), parts, PACKING), TrainedEmbedding(parts, PACKING)
    expected = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), **PACKING)
    ids = mx.array([[3, 0, 47]])
    for made in (layer.parts(), embedding.parts()):
        assert all(mx.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(made, parts, strict=True))
    assert mx.array_equal(layer.matrix(), expected)
    assert mx.array_equal(embedding(ids), expected[ids])
    x = mx.random.normal((5, 128))
    np.testing.assert_allclose(layer(x), x @ expected.T, atol=1e-5)
    np.testing.assert_allclose(embedding.as_linear(x), x @ expected.T, atol=1e-5)


def test_gradients_are_those_of_the_stored_scales_and_biases():
    """Of mx.quantized_matmul's scales and biases, by the chain rule: bias = b + s (shift - 7.5 gain)."""
    parts, x = packed((16, 128), mx.float32), mx.random.normal((9, 128), key=mx.random.key(1))
    layer = TrainedLinear(Linear(128, 16, bias=False), parts, PACKING)
    _, found = nn.value_and_grad(layer, lambda x: mx.sin(layer(x)).sum())(x)

    def reference(scales, biases):
        return mx.sin(mx.quantized_matmul(x, parts[0], scales, biases, True, 64, 4)).sum()

    scales, biases = mx.grad(reference, (0, 1))(*parts[1:])
    np.testing.assert_allclose(found["shift"], parts[1] * biases, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["gain"], parts[1] * (scales - 7.5 * biases), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [4, 100])
def test_experts_learn_from_their_own_tokens_alone(tokens):
    parts = packed((4, 16, 128), mx.float32)
    layer = TrainedLinear(SwitchLinear(4, 128, 16), parts, PACKING)
    experts = mx.array(np.random.default_rng(0).choice([0, 2, 3], (tokens, 2)))  # nothing for expert 1
    x = mx.random.normal((tokens, 128))

    def loss(x):
        groups = Groups(experts, 4)
        return mx.sin(layer(groups.rows(x), groups)).sum()

    _, gradients = nn.value_and_grad(layer, loss)(x)
    sizes = mx.abs(gradients["gain"]).sum(axis=(1, 2))
    assert sizes[1] == 0
    assert all(sizes[i] > 0 for i in {*np.array(experts).flatten().tolist()})


def teacher_of(logits, kept):
    """A teacher of the whole distributions' likeliest `kept` tokens: one row."""
    log_probs = nn.log_softmax(logits)
    tokens = mx.argsort(-log_probs, axis=-1)[:, :kept]
    return Teacher(
        mx.zeros((1, len(logits)), mx.int32), tokens[None], mx.take_along_axis(log_probs, tokens, -1)[None], 1
    )


def test_a_divergence_is_that_of_the_likeliest_tokens_and_one_bucket():
    source, model = (mx.random.normal((7, 50), key=mx.random.key(seed)) * 3 for seed in (0, 1))
    rows = mx.array([0])
    p, q = (np.array(nn.softmax(logits)).astype(np.float64) for logits in (source, model))
    order = np.argsort(-p, axis=-1)[:, :5]
    p_kept, q_kept = (np.take_along_axis(a, order, -1) for a in (p, q))
    p5, q5 = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (p_kept, q_kept))
    expected = (p5 * np.log(p5 / q5)).sum(-1).mean()
    assert float(teacher_of(source, 5).divergence(model, rows)) == pytest.approx(expected, rel=1e-4)
    whole = (p * np.log(p / q)).sum(-1).mean()
    assert float(teacher_of(source, 50).divergence(model, rows)) == pytest.approx(whole, rel=1e-3)
    assert expected < whole
    assert float(teacher_of(source, 5).divergence(source, rows)) == pytest.approx(0, abs=1e-5)


SOURCES = {
    "mini-4k": dict(oracle.CONFIGS["mini-4k"]),
    "tied": dict(oracle.CONFIGS["phi-4-mini"]),
    "experts": dict(moe_models.RAW),
    "small": {
        **small_models.RAW,
        "hidden_size": 64,
        "ff_intermediate_size": 64,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_member_learns(name, tmp_path, monkeypatch):
    """Rounded to 2 bits: fused layers, tied embeddings, experts, block-sparse attention, biases."""
    source = RandomSource("BF16", scale=0.1, **SOURCES[name])
    if name == "experts":  # routers that decide: a token that goes elsewhere is a jump that no gradient sees
        read = source.read
        monkeypatch.setattr(source, "read", lambda n: read(n) * 20 if n.endswith("moe.gate.weight") else read(n))
    layout = Layout.of(source, uniform(2, 32) | left_alone(source.config))
    arrays = arrays_of(layout, rounded(source))
    student = Student(source.config, arrays, layout.packings)
    ids = mx.array(4 * random_ids(32, source.config.vocab_size)).reshape(4, 32)  # what is held out is what is learnt
    stream = LayerStream(source)
    hidden = stream.embed(ids)
    for i in range(source.config.num_hidden_layers):
        hidden = stream.run(stream.layer(i), hidden)
    teacher.write_teacher(tmp_path / "teacher", stream, hidden, ids, 3)
    monkeypatch.setattr(endtoend, "EPOCHS", 8)
    gain = student.train(teacher.read_teacher(tmp_path / "teacher"), tmp_path / "checkpoint", lambda *_: None)
    assert gain.held_after < gain.held_before
    assert student.trained.keys() == layout.packings.keys()
    for name, module in student.trained.items():
        path = name.removesuffix(".weight")
        codes, scales, biases = module.parts()
        assert mx.array_equal(codes, arrays[name])
        assert (scales.dtype, biases.dtype) == (mx.bfloat16, mx.bfloat16)
        assert not mx.array_equal(scales, arrays[f"{path}.scales"]), path
        assert not mx.array_equal(biases, arrays[f"{path}.biases"]), path


@pytest.mark.long
def test_the_source_is_not_read_while_the_packed_model_is_trained(tmp_path):
    source = RandomSource(num_hidden_layers=2)
    layout, ids = Layout.of(source, uniform(4, 64)), random_ids(4 * 256)
    stages = []

    def progress(now):
        stages.append(now.stage)
        if now.stage == "distilling":
            source.read = None

    rounder, _, _ = distilled(source, layout, ids, tmp_path, progress=progress)
    arrays_of(layout, rounder)
    assert list(dict.fromkeys(stages)) == ["packing", "distilling"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_directory(tmp_path_factory.mktemp("small") / "source")


@pytest.fixture
def brief(monkeypatch):
    """The least text that can be distilled is what a model writes itself."""
    monkeypatch.setattr(own_text, "OWN_TOKENS", 1024)


KILLED = """
import os, signal, sys
from phi3_mlx import convert
from phi3_mlx.conversion import endtoend, own_text

endtoend._CHECKPOINT_EVERY = 0
own_text.OWN_TOKENS = 1024

def progress(now):
    if (now.stage, now.done) == ("distilling", 3):
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], sys.argv[2], bits=3, method="distill", report=False, calibration="self", progress=progress)
"""


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(small, brief, tmp_path):
    """Be the text a file, or the model's own, which is not written again."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", KILLED, str(small), str(tmp_path / "killed")]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    work = tmp_path / "killed.unfinished"
    assert {path.name for path in work.iterdir()} >= {"checkpoint.safetensors", "own_text.json"}
    assert not (tmp_path / "killed").exists()
    with pytest.raises(OptionError, match="other arguments"):
        convert(small, tmp_path / "killed", bits=4, method="distill", report=False, calibration="self")
    seen = []
    convert(
        small, tmp_path / "killed", bits=3, method="distill", report=False, calibration="self", progress=seen.append
    )
    assert {now.stage for now in seen} == {"distilling", "writing"}
    assert next(now.done for now in seen if now.stage == "distilling") == 3
    assert not work.exists()
    convert(small, tmp_path / "whole", bits=3, method="distill", report=False, calibration="self")
    for name in ("model.safetensors", "calibration.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.long
def test_a_text_that_was_written_is_kept_when_packing_is_cut(small, brief, tmp_path):
    def cut(now):
        if now.stage == "packing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small, tmp_path / "made", bits=3, method="distill", report=False, calibration="self", progress=cut)
    kept = (tmp_path / "made.unfinished" / "own_text.json").read_bytes()
    seen = []
    with pytest.raises(OptionError, match="other arguments"):
        convert(small, tmp_path / "made", bits=3, method="distill", report=False, calibration="self", seed=1)
    assert (tmp_path / "made.unfinished" / "own_text.json").read_bytes() == kept
    convert(small, tmp_path / "made", bits=3, method="distill", report=False, calibration="self", progress=seen.append)
    assert not any(now.stage == "writing a text" for now in seen)
    assert not (tmp_path / "made.unfinished").exists()


def test_what_it_gave_is_in_the_report_and_mlx_lm_reads_it(small, brief, tmp_path):
    made = convert(small, tmp_path / "made", bits=4, effort="best", text=stories("sample")[:300], calibration="self")
    report = (made.path / "REPORT.md").read_text()
    assert f"| held out | {made.gain.held_before:.5f} | {made.gain.held_after:.5f} |" in report
    steps = re.findall(r"^\| (?:the source's|targets|these).* \| ([\d.]+) \|$", report, re.M)
    inherited, target, nearest, columns, refitted = map(float, steps)
    assert target <= inherited < refitted < columns < nearest
    assert json.loads((made.path / "config.json").read_text())["quantization"]["bits"] == 4
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    theirs, _ = mlx_lm.load_model(made.path)
    ours = read_model(made.path)
    for name, array in tree_flatten(ours.parameters()):
        assert mx.array_equal(dict(tree_flatten(theirs.parameters()))[name].astype(array.dtype), array), name


def test_a_text_too_short_to_train_on_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_fitted_recipe", lambda *given: pytest.fail("bits were measured"))
    with pytest.raises(
        PromptError, match=r"the calibration text has .* tokens, and distilling needs 1,024; give a longer one"
    ):
        convert(TRAINED, tmp_path / "made", target_bpw=4, method="distill", calibration="Once upon a time. " * 30)
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_is_refused_with_the_way_out(monkeypatch):
    source = RandomSource("BF16", num_hidden_layers=2, vocab_size=4096)
    layout = Layout.of(source, uniform(4, 64))
    whole = sum(planning._training(source, layout, 4096).values())
    monkeypatch.setattr(machine, "room", lambda: whole - 1)
    with pytest.raises(MemoryLimitError, match="take method='gptq'"):
        planning.check_training(source, layout, 4096)
    monkeypatch.setattr(machine, "room", lambda: whole)
    planning.check_training(source, layout, 4096)


@pytest.mark.long
def test_the_plan_of_the_training_holds(tmp_path):
    source = RandomSource("BF16", num_hidden_layers=3, vocab_size=4096)
    layout, ids = Layout.of(source, uniform(4, 64)), random_ids(4 * 256)
    before = None

    def progress(now):
        nonlocal before
        if now.stage == "distilling" and before is None:
            mx.synchronize()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()

    distilled(source, layout, ids, tmp_path, progress=progress)
    kept = layout.nbytes  # what was in memory before, too
    peak = mx.get_peak_memory() - before + kept
    planned = sum(planning._training(source, layout, len(ids)).values())
    assert peak < planned < 3 * peak, f"{planned / peak:.2f}"


def test_a_folder_of_somebodys_own_is_left_alone(tmp_path):
    own = tmp_path / "made.unfinished" / "novel.txt"
    own.parent.mkdir()
    own.write_text("Chapter 1")
    with pytest.raises(OptionError, match="holds novel"):
        convert(TRAINED, tmp_path / "made", bits=4, method="distill", report=False)
    assert own.read_text() == "Chapter 1"


def test_a_run_towards_other_weights_is_told_from_this_one(tmp_path, monkeypatch):
    source = RandomSource(num_hidden_layers=1)
    layout = Layout.of(source, uniform(4, 64))
    key = distillation._key(source, layout, [1, 2, 3])
    assert distillation._key(source, layout, [1, 2, 3]) == key
    assert distillation._key(source, layout, [1, 2, 4]) != key
    read = source.read
    monkeypatch.setattr(source, "read", lambda n: read(n) + (n == "lm_head.weight"))
    assert distillation._key(source, layout, [1, 2, 3]) != key


def test_an_effort_is_a_method():
    methods = {effort: ConvertOptions(effort=effort).rounding for effort in ("quick", "good", "best")}
    assert methods == {"quick": "round", "good": "gptq", "best": "distill"}
    assert ConvertOptions().rounding == "round"
    assert ConvertOptions(effort="best", method="distill").reads_text
    assert not ConvertOptions(effort="quick", method="round").reads_text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"effort": "best", "method": "gptq"}, "effort=best is method=distill, not method=gptq; leave one out"),
        ({"effort": "good", "method": "round"}, "effort=good is method=gptq, not method=round; leave one out"),
        ({"effort": "good", "dequantize": True}, "it has no use for effort=good"),
        ({"effort": "quick", "dequantize": True}, "it has no use for effort=quick"),
        ({"method": "round", "dequantize": True}, "it has no use for method=round"),
    ],
)
def test_an_effort_that_says_something_else_is_refused_by_what_was_given(given, words):
    with pytest.raises(OptionError, match=words):
        ConvertOptions(**given)


def test_a_training_that_ruins_the_model_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(endtoend, "_RATE", 1e3)
    source = RandomSource("BF16", num_hidden_layers=2)
    layout, ids = Layout.of(source, uniform(4, 64)), random_ids(4 * 256)
    rounder, _, gain = distilled(source, layout, ids, tmp_path)
    assert gain.held_after == gain.held_before
    assert math.isfinite(gain.after)
    expected = arrays_of(layout, calibrated(source, layout, ids))
    for name, array in arrays_of(layout, rounder).items():
        assert mx.array_equal(array, expected[name]), name


def test_the_likeliest_tokens_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "KEPT", 7)
    source = RandomSource(num_hidden_layers=1)
    stream, ids = LayerStream(source), mx.array(random_ids(64)).reshape(2, 32)
    hidden = stream.run(stream.layer(0), stream.embed(ids))
    teacher.write_teacher(tmp_path / "teacher", stream, hidden, ids, 1)
    found = teacher.read_teacher(tmp_path / "teacher")
    assert found.fitted == 1
    model = oracle.make_ours(source.raw_config)
    model.load_weights([(name, source.read(name)) for name in source.tensors])
    log_probs = np.array(nn.log_softmax(model(ids)))
    best = np.sort(log_probs, axis=-1)[..., -7:]
    np.testing.assert_allclose(np.sort(found.log_probs, axis=-1), best, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(log_probs, np.array(found.tokens), -1), found.log_probs, atol=1e-4)
