"""16-bit training against float32: small gradients of large batches, sums of many parts, gradients beyond float16."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tuning_models import examples, facts, make_directory, randomize, write_jsonl

from phi3_mlx.errors import OptionError
from phi3_mlx.tuning import Settings
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.batches import make_part
from phi3_mlx.tuning.gradients import Gradients
from phi3_mlx.tuning.loss import part_loss
from phi3_mlx.tuning.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


def make(base, dtype, strength=1.0, **options):
    """A model with adapters that change something, and its settings."""
    settings = Settings(**{"model": str(base), "data": "-", "output": "-", "rank": 2, "dtype": dtype, **options})
    model, adapters = runs.load_for_training(
        type("Prepared", (), {"settings": settings, "checkpoint": base, "start": None})
    )
    randomize(adapters)
    for adapter in adapters.values():
        adapter.lora_a, adapter.lora_b = adapter.lora_a / strength, adapter.lora_b * strength
    model.train()
    return model, settings


def off(ours, theirs):
    """|difference| / |theirs| over all arrays."""
    difference = sum(np.square(ours[name] - theirs[name]).sum() for name in theirs)
    return float(np.sqrt(difference / sum(np.square(array).sum() for array in theirs.values())))


def flat(gradients):
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(gradients)}


def test_a_large_batch_has_float32s_gradients_in_float16(base):
    """The mean over many tokens is taken behind the backward pass; in front of it, it would lose most of them."""
    data = examples([9, 12, 7, 20, 40], trained=1.0)
    steps = {}
    for dtype in ("float32", "float16"):
        model, settings = make(base, dtype, batch_size=5)
        steps[dtype] = flat(Trainer(model, data, [], settings, base, {}).gradients(0)[1])
    assert off(steps["float16"], steps["float32"]) < 0.05
    part, tokens = make_part(data), 1 << 20  # as if they stood among this many
    _, lost = nn.value_and_grad(model, lambda: part_loss(model, part) / tokens)()
    assert off({name: array * tokens for name, array in flat(lost).items()}, steps["float32"]) > 0.3


def test_gradients_beyond_float16_are_computed_again_smaller(base):
    """A sum over tokens that float16 cannot hold; a loss that is not finite is left to the trainer."""
    part = make_part(examples([150], trained=1.0))
    _, expected, _ = Gradients(make(base, "float32", strength=1e3)[0]).of(part)
    model, _ = make(base, "float16", strength=1e3)
    _, overflown = nn.value_and_grad(model, lambda: part_loss(model, part))()
    assert not all(np.isfinite(array).all() for array in flat(overflown).values())
    loss, found, _ = Gradients(model).of(part)
    assert off(flat(found), flat(expected)) < 0.05
    assert loss == pytest.approx(float(part_loss(model, part).item()), rel=1e-5)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    loss, found, _ = Gradients(model).of(part)
    assert np.isnan(loss)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_add_up_in_float32(dtype, base):
    """Of a full fine-tuning too, whose gradients are of 16 bits themselves."""
    model, _ = make(base, dtype, method="full")
    large, small = examples([60], trained=1.0), examples([4] * 12, seed=1)
    gradients = Gradients(model)
    _, whole, _ = gradients.of_parts((make_part([one]), None) for one in (*large, *small))
    exact = flat(gradients.of(make_part(large))[1])
    for one in small:
        exact = {name: exact[name] + array for name, array in flat(gradients.of(make_part([one]))[1]).items()}
    assert off(flat(whole), exact) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_output_layers_pieces_add_up_in_float32(dtype, base, monkeypatch):
    from phi3_mlx.tuning import loss

    part = make_part(examples([120], trained=1.0))
    model, _ = make(base, dtype, method="full")
    whole = flat(Gradients(model).of(part)[1])["lm_head.weight"]
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4032)
    monkeypatch.setattr(loss, "_ROWS", 1)
    pieces = flat(Gradients(model).of(part)[1])["lm_head.weight"]
    assert np.linalg.norm(pieces - whole) / np.linalg.norm(whole) < (2e-3 if dtype == "bfloat16" else 3e-4)


def test_full_fine_tuning_in_float16_is_refused(base, tmp_path):
    """Its optimizers' squares of gradients are 0 in float16, and the first step divides by them."""
    path = write_jsonl(tmp_path / "facts.jsonl", facts(12))
    options = {"model": str(base), "data": str(path), "output": str(tmp_path / "out"), "method": "full"}
    with pytest.raises(OptionError, match=r"dtype float16 .* leave dtype out"):
        runs.prepare(Settings(**options, dtype="float16"))
    notes = []
    runs.prepare(Settings(**options, dtype="bfloat16"), notes.append)
    assert any("bfloat16" in note for note in notes)
    notes.clear()
    runs.prepare(Settings(**options, dtype="float32"), notes.append)
    assert not any("float" in note for note in notes)
