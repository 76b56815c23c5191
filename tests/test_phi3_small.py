"""Phi-3-small against the float64 oracle, and through every command: its numbers, its files, its training."""

import functools
import json

import mlx.core as mx
import mlx.nn as nn
import naive
import naive_small
import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from oracle import generate, ids_of, last_logits, logits_of
from small_models import LONG, ORIGINAL, RAW
from tuning_models import examples

from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.errors import ConfigError
from phi3_mlx.models import parse_config, phi3_small
from phi3_mlx.models.cache import KVBits
from phi3_mlx.tuning.batches import make_part
from phi3_mlx.tuning.loss import part_loss

SAME = 2e-4
CONFIGS = {
    "8k": RAW,
    "128k": {**RAW, **LONG},
    "homogeneous": {**RAW, "blocksparse_homo_head_pattern": True, "rope_position_scale": 2.5},
    "all-sparse": {**RAW, "dense_attention_every_n_layers": None, "mup_use_scaling": False, "gegelu_limit": None},
    "every-third": {
        **RAW,
        "dense_attention_every_n_layers": 3,
        "blocksparse_vert_stride": 9,
        "mup_embedding_multiplier": None,
        "mup_width_multiplier": None,
        "mup_attn_multiplier": 2.0,
    },
}


@functools.cache
def model_of(name: str):
    return small_models.make(CONFIGS[name])


@functools.cache
def steps_of(name: str, length: int = 80, seed: int = 0) -> np.ndarray:
    raw = CONFIGS[name]
    return naive_small.every_step(raw, naive.weights_of(model_of(name)), ids_of(length, seed=seed)[0])


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - theirs).max())


# Numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_oracles_at_every_length_around_an_edge(name):
    raw, model = CONFIGS[name], model_of(name)
    weights = naive.weights_of(model)
    for length in (1, 7, 8, 9, 12, 13, ORIGINAL, ORIGINAL + 1, 61):
        ids = ids_of(length)
        expected = naive_small.logits(raw, weights, ids[0])
        assert expected.std() > 0.05
        found = model(mx.array(ids))
        assert found.dtype == mx.float32
        assert off(found[0], expected) < SAME, length


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(CONFIGS)), st.sets(st.integers(1, 79), max_size=6))
def test_any_chunking_is_the_oracle(name, edges):
    """The last row of each piece: the 128K model's earlier rows belong to the regime of the piece's end."""
    model, expected = model_of(name), steps_of(name)
    cache, first = model.make_cache(), 0
    for last in sorted([*edges, 80]):
        assert off(last_logits(model, ids_of(80)[:, first:last], cache)[0], expected[last - 1]) < SAME
        first = last


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_is_the_oracle(name):
    model, ids, expected = model_of(name), ids_of(80), steps_of(name)
    cache = model.make_cache()
    for i in range(80):
        assert off(last_logits(model, ids[:, i : i + 1], cache)[0], expected[i]) < SAME, i


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["8k", "128k", "every-third"]),
    st.lists(st.integers(0, 40), min_size=2, max_size=3),
    st.sampled_from([7, 16, 80]),
)
def test_a_ragged_batch_is_its_rows_alone(name, padding, chunk):
    model, length = model_of(name), 60
    ids = ids_of(length, len(padding))
    cache = model.make_cache(left_padding=padding)
    for first in range(0, length, chunk):
        last = last_logits(model, ids[:, first : first + chunk], cache)
    weights = naive.weights_of(model)
    for row, before in enumerate(padding):
        assert off(last[row], naive_small.logits(CONFIGS[name], weights, ids[row, before:])[-1]) < SAME


def test_a_packed_cache_is_near_and_any_chunking_the_same():
    raw = {**RAW, "hidden_size": 128}  # heads of 32
    model, ids = small_models.make(raw), ids_of(70)
    expected = naive_small.logits(raw, naive.weights_of(model), ids[0])[-1]
    errors = {}
    for bits in (8, 4):
        one, other = (
            logits_of(model, ids, chunks, bits=KVBits(bits, bits))[0, -1] for chunks in ([69], [3, 20, 33, 50])
        )
        errors[bits] = off(one, expected)
        assert off(one, other) < 0.5 * errors[bits] + SAME
    assert errors[8] < 0.05 * expected.std() < 20 * errors[4]


@pytest.mark.parametrize("name", ["8k", "128k"])
@pytest.mark.parametrize("chunk", [5, 512])
def test_mlx_lm_generate_step_gives_the_oracles_tokens(name, chunk):
    generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    ids, model = ids_of(ORIGINAL - 3)[0], model_of(name)
    stream = generate_step(mx.array(ids), model, max_tokens=12, prefill_step_size=chunk)
    tokens = [int(token) for token, _ in stream]
    assert tokens == naive_small.greedy(CONFIGS[name], naive.weights_of(model), ids, 12)
    assert tokens == generate(model, ids, 12, chunk)


@pytest.mark.parametrize("name", ["8k", "128k"])
def test_trimmed_tokens_leave_no_trace(name):
    """Across the boundary of a regime too."""
    model, ids = model_of(name), ids_of(60)
    cache = model.make_cache()
    last_logits(model, ids[:, :30], cache)
    last_logits(model, ids_of(20, seed=5), cache)
    for layer in cache:
        layer.trim(32)
    assert off(last_logits(model, ids[:, 18:22], cache)[0], steps_of(name)[21]) < SAME
    assert off(last_logits(model, ids[:, 22:60], cache)[0], steps_of(name)[59]) < SAME


def test_mscales_that_are_given_are_taken():
    scaling = {**LONG["rope_scaling"], "short_mscale": 1.3, "long_mscale": 0.8}
    for changes in ({}, {"short_mscale": -1}, {"long_mscale": None}):
        raw = {**RAW, **LONG, "rope_scaling": {**scaling, **changes}}
        if changes.get("long_mscale", 1) is None:
            del raw["rope_scaling"]["long_mscale"]
        model = small_models.make(raw)
        for length in (ORIGINAL, ORIGINAL + 9):
            expected = naive_small.logits(raw, naive.weights_of(model), ids_of(length)[0])
            assert off(model(mx.array(ids_of(length)))[0], expected) < SAME


def test_ids_without_a_token_are_never_chosen():
    raw = {**RAW, "vocab_size": 100352, "num_hidden_layers": 1}
    model = small_models.make(raw)
    ids = np.array([[100257, 100262, 198, 9906, 100266, 198, 100263, 198]], dtype=np.int32)
    found, expected = np.array(model(mx.array(ids)))[0], naive_small.logits(raw, naive.weights_of(model), ids[0])
    least = np.finfo(np.float32).min
    assert (found == least).sum(axis=1).tolist() == [91] * 8
    np.testing.assert_array_equal(found == least, expected == least)
    assert off(found[found != least], expected[expected != least]) < SAME
    kept = {100255, 100257, 100261, 100262, 100263, 100266}
    assert (found[:, sorted(kept)] > least).all()


@pytest.mark.parametrize("limit", [None, 2.0])
def test_gegelu_bounds_what_is_finite(limit):
    x = np.array([[-50, -30], [30, 30], [np.inf, 1], [1, np.inf], [1, -np.inf], [-1, 3], [2.5, -2.5], [0, 0]])
    config = parse_config({**RAW, "gegelu_limit": limit})
    mlp = phi3_small.MLP(config)
    mlp.up_proj = mlp.down_proj = nn.Identity()
    np.testing.assert_allclose(
        np.array(mlp(mx.array(x.reshape(-1).astype(np.float32)))), naive_small.gegelu(x, limit)[:, 0], rtol=1e-5
    )


@pytest.mark.parametrize("limit", [np.inf, 2.0])
def test_gegelus_gradient_is_that_of_its_formula(limit):
    x = mx.random.normal((3, 40), key=mx.random.key(2)) * 2.5
    weights = mx.random.normal((3, 20), key=mx.random.key(3))

    def formula(x):
        gate, linear = mx.minimum(x[:, 0::2], limit), mx.clip(x[:, 1::2], -limit, limit)
        return (gate * mx.sigmoid(1.702 * gate) * (linear + 1) * weights).sum()

    found, expected = (mx.grad(f)(x) for f in (lambda x: (phi3_small.gegelu(x, limit) * weights).sum(), formula))
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


# The config


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"ff_dim_multiplier": 4},
        {"sliding_window": 128},
        {"blocksparse_vert_stride": 0},
        {"blocksparse_block_size": None},
        {"gegelu_limit": -1},
        {"rope_embedding_base": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {**LONG["rope_scaling"], "original_max_position_embeddings": None}},
        {"rope_scaling": {**LONG["rope_scaling"], "long_factor": [1.0] * 3}},
        {"mup_use_scaling": 1},
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(changes):
    key = next(iter(changes))
    with pytest.raises(ConfigError, match=key if key != "rope_scaling" else "rope|factor|original"):
        parse_config({**RAW, **changes})


@pytest.mark.parametrize("key", phi3_small._STATED)
def test_a_key_whose_absence_is_no_null_must_be_there(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse_config({name: value for name, value in RAW.items() if name != key})


def test_the_released_config_is_read(shared):
    config = parse_config(json.loads((shared / "configs" / "Phi-3-small-8k-instruct.json").read_text()))
    assert [config.is_dense(layer) for layer in range(4)] == [False, True, False, True]
    assert config.softmax_scale == 1 / 128
    assert [config.pattern.residue(head) for head in (0, 1, 7, 8)] == [7, 6, 0, 7]
    assert config.tie_word_embeddings


# Training


@pytest.mark.parametrize("name", ["8k", "128k"])
@pytest.mark.parametrize("dora", [False, True])
def test_sequences_end_to_end_train_as_alone(name, dora):
    model = small_models.make(CONFIGS[name])
    targets = find_targets(model.config, ["query_key_value", "dense", "up_proj", "down_proj"])
    adapters = attach(model, targets, 3, 6.0, dora=dora)
    rng = np.random.default_rng(1)
    for adapter in adapters.values():
        adapter.lora_b = mx.array(0.05 * rng.standard_normal(adapter.lora_b.shape).astype(np.float32))
    data = examples((7, 2, ORIGINAL + 9, 23, ORIGINAL + 1, 50))
    total = sum(int(example.trained.sum()) for example in data)

    def together():
        return part_loss(model, make_part(data)) / total

    def alone():
        losses = [part_loss(model, make_part([example])) / total for example in data]
        return sum(losses, mx.array(0.0))

    (one, ours), (other, theirs) = (nn.value_and_grad(model, function)() for function in (together, alone))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)
    ours, theirs = dict(tree_flatten(ours)), dict(tree_flatten(theirs))
    assert len(ours) == 3 * 4 * (3 if dora else 2)
    for key, gradient in theirs.items():
        assert off(ours[key], np.array(gradient)) < 1e-4 * (1 + float(mx.abs(gradient).max())), key


def test_the_loss_is_the_oracles():
    model = small_models.make(CONFIGS["128k"])
    data, weights, expected = examples((30, 9)), naive.weights_of(model), 0.0
    for example in data:
        logits = naive_small.logits(CONFIGS["128k"], weights, example.ids[:-1])
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected -= logs[np.arange(len(logits)), example.ids[1:]][example.trained[1:]].sum()
    assert part_loss(model, make_part(data)).item() == pytest.approx(expected, rel=1e-5)
