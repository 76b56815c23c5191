"""Phi-3.5-MoE against transformers' PhimoeForCausalLM, a naive routing oracle, and every layout of its weights.

transformers 5 uses the short factors at every length; past the original length the reference is its model with the
long ones. Arrays that it computed are in `golden/`.
"""

import functools
import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import moe_models
import naive
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden_moe import GOLDEN, LENGTHS, PROMPT, STEPS
from mlx.utils import tree_flatten, tree_map
from moe_models import CONFIGS, EXPERTS, ORIGINAL, RAW
from oracle import ids_of, last_logits, logits_of

from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import CheckpointError, ConfigError
from phi3_mlx.models import build, experts, parse_config, shapes
from phi3_mlx.models.cache import KVBits
from phi3_mlx.models.phi_moe import route
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.quantization import DEFAULTS

TOLERANCE = 1e-3  # the promise; measured: about 1e-5
NAMES = list(CONFIGS)


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).max())


@functools.cache
def ours(name: str = "released"):
    return moe_models.make_ours(CONFIGS[name])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


# Whole passes


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_golden(name, golden):
    for length in LENGTHS:
        assert off(last_logits(ours(name), ids_of(length)), golden[f"{name}/{length}"][None]) < TOLERANCE, length


@pytest.mark.parametrize("name", NAMES)
def test_the_naive_oracle_equals_golden(name, golden):
    weights = naive.weights_of(ours(name))
    for length in (ORIGINAL, ORIGINAL + 1):
        found = moe_models.naive_logits(CONFIGS[name], weights, ids_of(length)[0])[-1]
        assert off(found, golden[f"{name}/{length}"]) < 1e-3, length


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_at_every_position(name, golden):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    logits = moe_models.reference(CONFIGS[name], moe_models.random_weights(CONFIGS[name]))
    for length in (1, *LENGTHS):
        expected = logits(ids_of(length)[0])
        assert expected.std() > 0.5
        assert off(logits_of(ours(name), ids_of(length))[0], expected) < TOLERANCE, length
        if length in LENGTHS:
            assert off(expected[-1], golden[f"{name}/{length}"]) < 1e-4, "rerun tests/make_golden_moe.py"


def test_routing_weights_other_than_one_come_up():
    """What the parity tests would miss if they did not."""
    x = mx.random.normal((256, RAW["hidden_size"]), key=mx.random.key(0))
    _, weights = route(ours().layers[0].block_sparse_moe.gate(x), 0.02)
    seen = np.array(weights)
    assert (seen == 1).mean() > 0.1
    assert ((seen > 0.01) & (seen < 0.99)).mean() > 0.1


@pytest.mark.parametrize("name", ["released", "gain by regime"])
def test_the_two_regimes_differ_enough_to_be_seen(name):
    model, ids = ours(name), ids_of(ORIGINAL)
    short = last_logits(model, ids)
    model.model.longrope = "long"
    try:
        assert off(last_logits(model, ids), short) > 100 * TOLERANCE
    finally:
        model.model.longrope = "auto"


def test_a_released_config_is_read(shared):
    config = parse_config(json.loads((shared / "configs" / "Phi-3.5-MoE-instruct.json").read_text()))
    assert (config.num_local_experts, config.experts_per_token, config.attention_bias) == (16, 2, True)
    assert config.longrope.short_mscale == config.longrope.long_mscale == 1.243163121016122
    assert sum(map(np.prod, shapes(config).values())) == 41_873_153_344


# The cache


@pytest.mark.parametrize("chunk", [1, 7, ORIGINAL])
def test_chunks_give_the_whole_pass_over_the_boundary(chunk, golden):
    model, ids = ours(), ids_of(ORIGINAL + 1)
    cache = model.make_cache()
    for first in range(0, ids.shape[1], chunk):
        last = last_logits(model, ids[:, first : first + chunk], cache)
    assert off(last, golden[f"released/{ORIGINAL + 1}"][None]) < TOLERANCE


def test_ragged_rows_equal_their_single_results():
    """Rows cross the boundary one after another, each in its own regime, routed together."""
    model, lengths, steps = ours("gain by regime"), (ORIGINAL + 2, 5, ORIGINAL - 2), 6
    rows = [ids_of(n + steps, seed=i)[0] for i, n in enumerate(lengths)]
    padding = [max(lengths) - n for n in lengths]
    batch = np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)])
    cache = model.make_cache(left_padding=padding)
    last = last_logits(model, batch[:, : max(lengths)], cache)
    for t in range(steps):
        for i, row in enumerate(rows):
            assert off(last[i], last_logits(model, row[None, : lengths[i] + t])[0]) < TOLERANCE, (t, i)
        last = last_logits(model, batch[:, max(lengths) + t : max(lengths) + t + 1], cache)


def test_a_window_is_kept():
    raw = {**RAW, "sliding_window": oracle.WINDOW}
    model, ids = moe_models.make_ours(raw), ids_of(ORIGINAL - 4)
    expected = moe_models.naive_logits(raw, naive.weights_of(model), ids[0])[-1]
    assert off(last_logits(model, ids), expected[None]) < TOLERANCE
    assert off(last_logits(ours(), ids), expected[None]) > 10 * TOLERANCE
    cache = model.make_cache()
    last_logits(model, ids[:, :-1], cache)
    assert off(last_logits(model, ids[:, -1:], cache), expected[None]) < TOLERANCE


def test_packed_keys_and_values_change_little():
    ids = ids_of(40)
    exact, packed = (logits_of(ours(), ids, (20,), bits=bits) for bits in (None, KVBits(8, 8)))
    # A token whose scores are near each other may change an expert, so not the largest difference.
    assert 0 < np.median(np.abs(packed - exact)) < 0.05 * exact.std()


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_golden(name, golden):
    assert PROMPT < ORIGINAL < PROMPT + STEPS
    assert oracle.generate(ours(name), ids_of(PROMPT)[0], STEPS) == golden[f"{name}/tokens"].tolist()


def test_the_engine_and_lookup_give_the_same_tokens(golden):
    for lookup in (0, 4):
        run = Generation(
            ours(),
            [ids_of(PROMPT)[0].tolist()],
            max_tokens=STEPS,
            sampling=Sampling(),
            **({"lookup": lookup} if lookup else {}),
        )
        assert [token.id for token in run] == golden["released/tokens"].tolist()


def test_mlx_lm_generate_step_gives_the_same_tokens(golden):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports'
        generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    stream = generate_step(mx.array(ids_of(PROMPT)[0]), ours(), max_tokens=STEPS, prefill_step_size=7)
    assert [token for token, _ in stream] == golden["released/tokens"].tolist()


# Routing

# On a coarse grid scores tie, and lie at the edge of 2 %; far apart and of both signs, too.
SCORES = st.one_of(
    st.integers(-300, 300).map(lambda n: n / 100),
    st.integers(98, 102).map(lambda n: n / 50),
    st.floats(-50, 50, width=32),
    st.just(0.0),
)


@given(st.lists(st.lists(SCORES, min_size=4, max_size=4), min_size=1, max_size=8), st.sampled_from([0.01, 0.1]))
@settings(max_examples=150, deadline=None)
def test_routing_is_the_naive_one(rows, noise):
    scores = np.array(rows, dtype=np.float32)
    chosen, weights = (np.array(found) for found in route(mx.array(scores), 2 * noise))
    for row, own_experts, own_weights in zip(scores, chosen, weights, strict=True):
        expected = moe_models.naive_route(row, noise)
        assert own_experts.tolist() == [expert for expert, _ in expected]
        assert off(own_weights, [weight for _, weight in expected]) < 1e-6


def test_routing_by_hand():
    """Two near ones share the first weight; the second stage has 4.95 alone. Far apart: both 1, not a share of 1."""
    chosen, weights = route(mx.array([[5.0, 4.95, 1.0, 0.0], [5.0, 3.0, 0.0, -1.0], [2.0, 2.0, 2.0, 2.0]]), 0.02)
    assert chosen.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert off(weights, [[0.5124974, 1.0], [1.0, 1.0], [0.25, 1 / 3]]) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routing_is_transformers(dtype):
    torch = pytest.importorskip("torch")
    sparsemixer = pytest.importorskip("transformers.models.phimoe.modeling_phimoe").sparsemixer
    scores = np.random.default_rng(0).standard_normal((4000, 16)).astype(np.float32) * 2
    scores[::3] = np.round(scores[::3] * 20) / 20
    weights, chosen = sparsemixer(torch.tensor(scores).to(getattr(torch, dtype)), 0.01, False)
    ours_chosen, ours_weights = route(mx.array(scores).astype(getattr(mx, dtype)), 0.02)
    assert ours_weights.dtype == getattr(mx, dtype)
    assert np.array_equal(np.array(ours_chosen), chosen.numpy())
    assert off(ours_weights.astype(mx.float32), weights.float()) <= (1e-6 if dtype == "float32" else 2**-8)


# Experts


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
@pytest.mark.parametrize("rows_dequantized", [1, 10**9])
def test_all_ways_to_multiply_agree(mode, rows_dequantized, monkeypatch):
    """Gathered, expert by expert, in blocks; an expert has many rows, one, or none. Values and gradients."""
    monkeypatch.setattr(experts, "dequantizing_pays", lambda *_: rows_dequantized)
    rng = np.random.default_rng(0)
    layer = experts.SwitchLinear(5, 32, 64)
    layer.weight = mx.array(rng.standard_normal((5, 64, 32)).astype(np.float32))
    chosen = mx.array(np.concatenate([np.zeros(90), np.full(109, 3), [4]]).astype(np.uint32)).reshape(-1, 2)
    if mode is not None:
        layer = layer.to_quantized(*DEFAULTS[mode], mode) if mode != "affine" else layer.to_quantized(32, 4)
    tokens = mx.array(rng.standard_normal((100, 32)).astype(np.float32))

    def total(tokens, many, training):
        monkeypatch.setattr(experts, "_ROWS_TO_SORT", many)
        layer.train(training)
        groups = experts.Groups(chosen, 5)
        return (groups.summed(layer(groups.rows(tokens), groups)) ** 2).sum()

    (value, slope), *others = [
        mx.value_and_grad(total)(tokens, *way) for way in ((10**9, False), (1, False), (1, True))
    ]
    for other, other_slope in others:
        assert off(other, value) < 1e-5 * value.item()
        assert off(other_slope, slope) < 1e-6 * float(mx.abs(slope).max())


def test_rows_by_expert_are_those_routed_to_it():
    chosen = mx.array([[2, 0], [1, 2], [2, 0]])
    groups = experts.Groups(chosen, 4)
    by_expert = groups.by_expert(groups.rows(mx.arange(3)[:, None]))
    assert [array.flatten().tolist() for array in by_expert] == [[0, 2], [1], [0, 1, 2], []]


def test_gradients_are_transformers_at_inference():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, ids = moe_models.make_ours(RAW), ids_of(40)
    model.train()
    theirs = moe_models.make_torch(RAW, moe_models.random_weights(RAW))
    labels = torch.tensor(ids.astype(np.int64))
    theirs(labels, labels=labels).loss.backward()
    expected = {name: mx.array(parameter.grad.numpy()) for name, parameter in theirs.named_parameters()}

    def loss(model):
        return nn.losses.cross_entropy(model(mx.array(ids))[:, :-1], mx.array(ids)[:, 1:]).mean()

    _, found = nn.value_and_grad(model, loss)(model)
    found = moe_models.transformers_5(dict(tree_flatten(found)))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert off(gradient, expected[name]) < 1e-5 + 1e-4 * float(mx.abs(expected[name]).max()), name
    assert float(mx.abs(found["model.layers.0.mlp.router.weight"]).max()) > 1e-4


def test_sequences_end_to_end_are_each_alone():
    model, lengths = moe_models.make_ours(RAW), (30, ORIGINAL + 3, 12)
    model.train()
    ids = ids_of(sum(lengths))
    hidden = np.array(model.model.end_to_end(mx.array(ids), lengths))[0]
    start = 0
    for length in lengths:
        alone = model.model(mx.array(ids[:, start : start + length]))[0]
        assert off(hidden[start : start + length], alone) < 1e-4
        start += length


# Weights on disk


@pytest.mark.parametrize("layout", ["mlx", "hugging_face", "transformers_5"])
def test_every_layout_loads(tmp_path, layout):
    weights = moe_models.random_weights(RAW)
    tensors = weights if layout == "mlx" else getattr(moe_models, layout)(weights)
    model = read_model(moe_models.write(tmp_path / "model", RAW, tensors, shards=3))
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, weights[name]), name


def test_transformers_saves_what_loads(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs, ids = moe_models.make_torch(RAW, moe_models.random_weights(RAW)), ids_of(20)
    for n, original in enumerate((True, False)):
        theirs.save_pretrained(tmp_path / str(n), save_original_format=original)
        model = read_model(tmp_path / str(n))
        assert off(logits_of(model, ids), logits_of(ours(), ids)) < 1e-5


@pytest.mark.parametrize("layout", ["mlx", "hugging_face"])
def test_packed_experts_load_stacked_or_apart(tmp_path, layout):
    """A conversion that packs the router too, as mlx-lm's do."""
    model = moe_models.make_ours(RAW)
    nn.quantize(model, 32, 4)
    packed = dict(tree_flatten(model.parameters()))
    tensors = packed if layout == "mlx" else moe_models.hugging_face(packed)
    raw = {**RAW, "quantization": {"group_size": 32, "bits": 4}}
    loaded = read_model(moe_models.write(tmp_path / "model", raw, tensors))
    ids = ids_of(50)
    assert off(logits_of(loaded, ids), logits_of(model, ids)) < 1e-5
    assert off(logits_of(loaded, ids), logits_of(ours(), ids)) > 0.1


def test_a_missing_expert_is_named(tmp_path):
    tensors = moe_models.hugging_face(moe_models.random_weights(RAW))
    del tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    with pytest.raises(CheckpointError) as caught:
        read_model(moe_models.write(tmp_path / "model", RAW, tensors))
    assert "missing model.layers.1.block_sparse_moe.experts.5.w2.weight" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_experts_are_stacked_one_by_one_in_loading(tmp_path):
    """Beside the model one expert's matrix is in memory, not a second stack."""
    raw = {**RAW, "intermediate_size": 4096, "num_hidden_layers": 1}
    directory = moe_models.write(tmp_path / "model", raw, moe_models.hugging_face(moe_models.random_weights(raw)))
    one = 4 * 4096 * RAW["hidden_size"]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = read_model(directory)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert mx.get_peak_memory() - before - weights < 2.5 * one < EXPERTS * one / 3


# Configs


def test_the_router_is_no_target_of_adapters():
    config = parse_config(RAW)
    assert list(config.adaptable) == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert set(config.linears) > set(config.adaptable)
    names = {name.removeprefix("model.layers.0.") for name in shapes(config) if ".layers.0." in name}
    for path, shape in config.linears.items():
        assert f"{path}.weight" in names
        assert shapes(config)[f"model.layers.0.{path}.weight"] == shape


REFUSED = {
    "three experts a token": ({"num_experts_per_tok": 3}, "num_experts_per_tok 3"),
    "one expert": ({"num_local_experts": 1}, "num_local_experts 1"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "a missing mscale": (
        {"rope_scaling": {k: v for k, v in RAW["rope_scaling"].items() if k != "long_mscale"}},
        "long_mscale is missing",
    ),
    "yarn": ({"rope_scaling": {**RAW["rope_scaling"], "type": "yarn"}}, "yarn"),
    "other packing": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "layers of kinds": ({"layer_types": ["full_attention"]}, "layer_types"),
    "a tied head with a bias": ({"tie_word_embeddings": True}, "lm_head_bias"),
}


@pytest.mark.parametrize(("changes", "names"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused(changes, names):
    with pytest.raises(ConfigError, match=names) as caught:
        parse_config({**RAW, **changes}, "some/config.json")
    assert "\n" not in str(caught.value)


def test_a_tied_head_without_a_bias():
    raw = {**RAW, "tie_word_embeddings": True, "lm_head_bias": False}
    model = build(parse_config(raw))
    assert "lm_head" not in model
    assert model(mx.array(ids_of(3))).shape == (1, 3, RAW["vocab_size"])


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # In 16 bits near scores change places, in each implementation others: here no two routers' rows are alike. Those
    # that still do make one text's distances 0.8 to 1.2 times the other's, so several texts are taken together.
    weights = moe_models.random_weights(RAW, near=0.5)
    exact, model = build(parse_config(RAW)), build(parse_config(RAW))
    exact.load_weights(list(weights.items()))
    model.load_weights(list(weights.items()))
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    rounded = moe_models.make_torch(RAW, weights).to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(8):
        ids = ids_of(ORIGINAL, seed=seed)
        wanted = logits_of(exact, ids)
        with torch.no_grad():
            half = rounded(torch.tensor(ids.astype(np.int64)), use_cache=False).logits.float().numpy()
        found = np.array(model(mx.array(ids)).astype(mx.float32))
        ours.append(np.median(np.abs(found - wanted)))
        theirs.append(np.median(np.abs(half - wanted)))
    assert np.mean(ours) < 1.15 * np.mean(theirs)
    cache = model.make_cache()
    for t in range(6):  # few rows, which go another way
        step = model(mx.array(ids[:, t : t + 1]), cache)
    assert step.dtype == mx.bfloat16
    assert np.median(np.abs(np.array(step.astype(mx.float32))[0, 0] - found[0, 5])) < 0.05
    model.eval()
    again = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.median(np.abs(again - found)) < 0.05
