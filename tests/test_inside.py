"""What `trace` and `inspect` read: the references' hidden states and attentions, on both sides of the boundary."""

import functools

import mlx.core as mx
import moe_models
import naive
import naive_small
import numpy as np
import oracle
import pytest
import small_models
from oracle import CONFIGS, ORIGINAL, WINDOW, ids_of
from test_phi3_small import CONFIGS as SMALL

from phi3_mlx import (
    Inside,
    Keep,
    batch_generate,
    encode_prompt,
    generate,
    inspect,
    load,
    places,
    stream_generate,
    trace,
)
from phi3_mlx.config import Config
from phi3_mlx.errors import MemoryLimitError, OptionError, PromptError
from phi3_mlx.models import build, parse_config
from phi3_mlx.models.cache import KVBits

SAME = 1e-3  # of numbers of about 1; measured: below 2e-5
NAMES = ["mini-4k", "3.5-mini", "medium-4k", "phi-4", "phi-4-mini", "long-and-window"]
LENGTHS = [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL]


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).max())


@functools.cache
def dense(name: str):
    return oracle.make_ours(CONFIGS[name])


@functools.cache
def mixture(name: str = "gain by regime"):
    return moe_models.make_ours(moe_models.CONFIGS[name])


@functools.cache
def small(name: str = "128k"):
    return small_models.make(SMALL[name])


MODELS = {
    "mini-4k": lambda: dense("mini-4k"),
    "phi-4-mini": lambda: dense("phi-4-mini"),
    "moe": mixture,
    "small": small,
}


def all_of(model) -> list[str]:
    return [*places(model)]


def keys_of(model) -> list[tuple[str, int | None]]:
    """Every place of every layer."""
    layers = range(model.config.num_hidden_layers)
    return [
        (name, layer)
        for name, place in places(model).items()
        if name != "blocks"
        for layer in (layers if place.per_layer else [None])
    ]


def torch_insides(theirs, ids: np.ndarray):
    import torch

    with torch.no_grad():
        out = theirs(
            torch.tensor(ids.astype(np.int64)), output_hidden_states=True, output_attentions=True, use_cache=False
        )
    return [hidden.numpy() for hidden in out.hidden_states], [weights.numpy() for weights in out.attentions]


def check_against(inside: Inside, states, attentions) -> None:
    """Hidden states as transformers lists them: the embedding, after each layer, the last of them normed."""
    layers = len(attentions)
    assert off(inside["embed"], states[0]) < SAME
    for layer in range(layers - 1):
        assert off(inside["resid_post", layer], states[layer + 1]) < SAME
        assert off(inside["resid_pre", layer + 1], states[layer + 1]) < SAME
    assert off(inside["final_norm"], states[-1]) < SAME
    for layer in range(layers):
        assert off(inside["pattern", layer], attentions[layer]) < 1e-4, layer
    assert np.std(states[-1]) > 0.3


# Against transformers


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_attentions_are_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = dense(name)
    theirs = oracle.make_torch(CONFIGS[name], model)
    for length in LENGTHS:
        ids = ids_of(length, rows=2)
        states, attentions = torch_insides(theirs, ids)
        with trace(model, keep=["embed", "resid_pre", "resid_post", "final_norm", "pattern"]) as inside:
            model(mx.array(ids))
        check_against(inside, states, attentions)
        read = inspect(model, ids.tolist(), ["embed", "resid_pre", "resid_post", "final_norm", "pattern"])
        check_against(read, states, attentions)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mixtures_hidden_states_and_attentions_are_transformers(length):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, raw, ids = mixture(), moe_models.CONFIGS["gain by regime"], ids_of(length)
    weights = moe_models.random_weights(raw)
    long = length > ORIGINAL
    if long:  # version 5 knows no long factors: its model with these as its short ones
        raw = {**raw, "rope_scaling": {**raw["rope_scaling"], "short_mscale": raw["rope_scaling"]["long_mscale"]}}
    states, attentions = torch_insides(moe_models.make_torch(raw, weights, long), ids)
    check_against(
        inspect(model, ids[0].tolist(), ["embed", "resid_pre", "resid_post", "final_norm", "pattern"]),
        states,
        attentions,
    )


# Against the project's own oracles


def naive_pattern(q, k, window: int | None, scale: float) -> np.ndarray:
    """Probabilities (H, L, L) of rotated q (L, H, D) and k (L, Hkv, D), query by query."""
    length, heads, _ = q.shape
    weights = np.zeros((heads, length, length))
    for head in range(heads):
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            scores = k[first : i + 1, head // (heads // k.shape[1])] @ q[i, head] * scale
            scores = np.exp(scores - scores.max())
            weights[head, i, first : i + 1] = scores / scores.sum()
    return weights


@pytest.mark.parametrize("name", ["mini-4k", "phi-4-mini"])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_queries_and_keys_are_taken_out_of_the_fused_layer(name, length):
    """By the formulas: rows of `qkv_proj`, rotated by the oracle's table, give the probabilities that are kept."""
    raw, model, ids = CONFIGS[name], dense(name), ids_of(length)
    weights = naive.weights_of(model)
    inside = inspect(
        model, ids[0].tolist(), ["attn_norm", "q", "k", "v", "q_rot", "k_rot", "pattern", "z", "act", "gate", "up"]
    )
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim = raw["hidden_size"] // heads
    cos, sin = naive.rope_table(raw, length, length)
    for layer in range(2):
        rows = np.array(inside["attn_norm", layer])[0] @ weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"].T
        rows = rows.reshape(length, heads + 2 * kv_heads, dim)
        q, k, v = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
        assert off(inside["q", layer][0], q) < SAME
        assert off(inside["k", layer][0], k) < SAME
        assert off(inside["v", layer][0], v) < SAME
        q, k = (np.stack([naive.rotate(x[:, h], cos, sin) for h in range(x.shape[1])], axis=1) for x in (q, k))
        gain = 1.0 if raw["rope_scaling"] is None else float(cos[0, 0])  # at position 0 a cosine is the factor alone
        assert off(inside["k_rot", layer][0][..., : 2 * cos.shape[1]], k[..., : 2 * cos.shape[1]] / gain) < SAME
        pattern = naive_pattern(q, k, raw["sliding_window"], dim**-0.5)
        assert off(inside["pattern", layer][0], pattern) < 1e-4
        group = heads // kv_heads
        mixed = np.stack([pattern[h] @ v[:, h // group] for h in range(heads)], axis=1)
        assert off(inside["z", layer][0], mixed) < SAME
        gate = np.array(inside["gate", layer])
        assert off(inside["act", layer], gate / (1 + np.exp(-gate)) * np.array(inside["up", layer])) < SAME


@pytest.mark.parametrize("name", ["8k", "128k", "homogeneous", "every-third"])
@pytest.mark.parametrize("length", [7, ORIGINAL, ORIGINAL + 1, 80])
def test_phi_3_smalls_stream_and_attentions_are_the_oracles(name, length):
    raw, model, ids, expected = SMALL[name], small(name), ids_of(length), {}
    naive_small.logits(raw, naive.weights_of(model), ids[0], inside=expected)
    for chunk in (None, 16):
        with trace(model, keep=["resid_post", "pattern"]) as inside:
            cache = None if chunk is None else model.make_cache([length])
            for first in range(0, length, chunk or length):
                model(mx.array(ids[:, first : first + (chunk or length)]), cache)
        for layer in range(raw["num_hidden_layers"]):
            assert off(inside["resid_post", layer][0], expected["resid_post", layer]) < SAME
            assert off(inside["pattern", layer][0], np.stack(expected["pattern", layer])) < 1e-4


def test_block_patterns_are_where_the_oracle_sees_something():
    raw, model, length = SMALL["128k"], small(), 75
    inside = inspect(model, ids_of(length)[0].tolist(), ["blocks"])
    assert inside.layers("blocks") == [i for i in range(raw["num_hidden_layers"]) if not naive_small.is_dense(raw, i)]
    size = raw["blocksparse_block_size"]
    for layer in inside.layers("blocks"):
        for head, blocks in enumerate(np.array(inside["blocks", layer])):
            seen = naive_small.visible(raw, head, length)
            expected = [
                [seen[i : i + size, j : j + size].any() for j in range(0, length, size)] for i in range(0, length, size)
            ]
            assert (blocks == expected).all()
    with pytest.raises(OptionError, match="can be read alone"), trace(model, edits=[_patch("blocks", 0.0)]):
        pass
    dense = next(i for i in range(raw["num_hidden_layers"]) if naive_small.is_dense(raw, i))
    with pytest.raises(OptionError, match=f"layer {dense} is dense and has no blocks"):
        inspect(model, [1, 2], Keep("blocks", layers=[inside.layers("blocks")[0], dense]))


def _patch(*arguments, **options):
    from phi3_mlx import patch

    return patch(*arguments, **options)


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_a_mixtures_router_tells_which_experts_it_chose(length):
    model, ids = mixture(), ids_of(length)
    inside = inspect(model, ids[0].tolist(), ["router", "experts", "expert_weights", "act", "mlp_norm", "mlp_out"])
    weights = naive.weights_of(model)
    for layer in range(2):
        scores = np.array(inside["router", layer])[0]
        normed = np.array(inside["mlp_norm", layer], dtype=np.float64)[0]
        assert off(scores, normed @ weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"].T) < SAME
        noise = moe_models.CONFIGS["gain by regime"]["router_jitter_noise"]
        chosen = [moe_models.naive_route(row, noise) for row in scores]
        assert np.array(inside["experts", layer])[0].tolist() == [[expert for expert, _ in row] for row in chosen]
        assert off(inside["expert_weights", layer][0], [[weight for _, weight in row] for row in chosen]) < 1e-4
        down = weights[f"model.layers.{layer}.block_sparse_moe.switch_mlp.down_proj.weight"]
        act = np.array(inside["act", layer])[0]
        out = [sum(w * (down[e] @ act[i, j]) for j, (e, w) in enumerate(row)) for i, row in enumerate(chosen)]
        assert off(inside["mlp_out", layer][0], out) < SAME


# What belongs together


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_the_sum_of_all_contributions(name):
    model, length = MODELS[name](), ORIGINAL + 3
    inside = inspect(
        model, ids_of(length)[0].tolist(), ["embed", "attn_out", "mlp_out", "resid_post", "final_in", "head_out"]
    )
    total = inside["embed"] + inside.stack("attn_out").sum(axis=0) + inside.stack("mlp_out").sum(axis=0)
    assert off(total, inside["final_in"]) < 1e-4 * float(mx.abs(total).max())
    assert mx.array_equal(inside["final_in"], inside["resid_post", -1])
    for layer in inside.layers("head_out"):
        bias = getattr(model.layers[layer].self_attn, "o_proj", None) or model.layers[layer].self_attn.dense
        added = inside["head_out", layer].sum(axis=2) + (bias.bias if "bias" in bias else 0)
        assert off(added, inside["attn_out", layer]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_place_has_the_shape_that_its_table_says(name):
    model = MODELS[name]()
    config: Config = model.config
    sizes = {
        "B": 2, "L": 9, "S": 9, "d": config.hidden_size, "H": config.num_attention_heads,
        "Hkv": config.num_key_value_heads, "D": config.head_dim, "n": config.intermediate_size,
        "V": config.vocab_size, "E": getattr(config, "num_local_experts", 0), "2": 2,
    }  # fmt: skip
    with trace(model, keep=all_of(model)) as inside:
        model(mx.array(ids_of(9, rows=2)))
    for key in keys_of(model):
        expected = tuple(sizes[size] for size in places(model)[key[0]].shape.strip("()").split(", "))
        assert inside[key].shape == expected, key
    assert inside.rows == 2


@pytest.mark.parametrize("name", MODELS)
def test_looking_on_changes_no_bit_and_leaves_nothing_behind(name):
    model, ids = MODELS[name](), mx.array(ids_of(ORIGINAL + 5, rows=2))
    before, modules = model(ids), [*map(id, model.modules())]
    graph = operations(lambda: model(ids))
    with trace(model, keep=all_of(model)):
        assert mx.array_equal(model(ids), before)
        assert operations(lambda: model(ids)) > graph
    assert mx.array_equal(model(ids), before)
    assert operations(lambda: model(ids)) == graph
    assert [*map(id, model.modules())] == modules


def operations(compute) -> int:
    """How many operations MLX has queued for what is computed."""
    from io import StringIO

    graph = StringIO()
    mx.export_to_dot(graph, compute())
    return graph.getvalue().count("shape=rectangle")


@pytest.mark.parametrize("name", MODELS)
def test_mlx_gets_the_operations_of_a_model_without_places(name, monkeypatch):
    """Whole passes, and steps of several rows."""
    from phi3_mlx.models import decoder, layer, phi3, phi3_small, phi_moe

    model, ids = MODELS[name](), mx.array(ids_of(ORIGINAL + 5, rows=2))

    def counted() -> list[int]:
        caches = [model.make_cache() for _ in range(3)]
        for cache in caches:
            model(ids[:1, :5], cache)
        return [
            operations(lambda: model(ids)),
            operations(lambda: model.model.together(ids[:1, :3], [1, 1, 1], caches)),
            operations(lambda: model.model.together(ids[:1, :7], [1, 3, 3], caches)),
        ]

    graphs = counted()
    for module in (decoder, layer, phi3, phi3_small, phi_moe):
        for function in ("at", "at_flat"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda place, x: x)
    assert counted() == graphs
    assert min(graphs) > 50


# Selections


def test_heads_and_positions_are_those_of_the_whole():
    model, ids = dense("phi-4-mini"), ids_of(20)[0].tolist()
    whole = inspect(model, ids, ["pattern", "q", "head_out", "resid_post"])
    part = inspect(
        model,
        ids,
        [
            Keep("pattern", layers=-1, heads=[2, 0], positions=[-1, 3]),
            Keep("q", layers=[1], heads=1),
            Keep("head_out", layers=0, heads=[1], positions=slice(5, None, 4)),
            Keep("resid_post", layers=range(2), positions=-2),
        ],
    )
    last = model.config.num_hidden_layers - 1
    chosen = whole["pattern", last][:, mx.array([2, 0])][:, :, mx.array([3, 19])]
    assert mx.allclose(part["pattern", last], chosen, atol=1e-6)
    assert part.positions("pattern", last) == [3, 19]
    assert mx.array_equal(part["q", 1], whole["q", 1][:, :, 1:2])
    assert mx.allclose(part["head_out", 0], whole["head_out", 0][:, 5::4, 1:2], atol=1e-5)
    assert mx.array_equal(part["resid_post", 1], whole["resid_post", 1][:, 18:19])
    assert part.layers("resid_post") == [0, 1]
    with pytest.raises(OptionError, match="resid_post of layer 2 was not kept"):
        part["resid_post", 2]


PIECES = [(0, 17), (17, 18), (18, ORIGINAL - 1), *((i, i + 1) for i in range(ORIGINAL - 1, ORIGINAL + 4))]


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_single_tokens_keep_what_the_whole_pass_does(name):
    """Over the boundary, behind which what was kept of the prompt is that of the long regime."""
    model, ids = MODELS[name](), mx.array(ids_of(PIECES[-1][1]))
    keep = [name for name in all_of(model) if name not in ("blocks", "logits")]
    with trace(model, keep=keep) as whole:
        model(ids)
    with trace(model, keep=keep) as parts:
        cache = model.make_cache()
        for first, last in PIECES:
            model(ids[:, first:last], cache)
    for key in keys_of(model):
        if key[0] != "logits":  # those of chunks before the boundary were made in the short regime
            assert parts[key].shape == whole[key].shape, key
            assert off(parts[key], whole[key]) < 2e-4 * max(1.0, float(mx.abs(whole[key]).max())), key


@pytest.mark.parametrize("name", ["mini-4k", "phi-4-mini", "moe"])
def test_a_packed_cache_can_be_looked_into(name):
    model, ids = MODELS[name](), mx.array(ids_of(PIECES[-1][1]))
    found = []
    for keep in ([], ["pattern", "logits", "v"]):
        with trace(model, keep=keep) as inside:
            cache = model.make_cache(bits=KVBits(8, 8))
            found += [model(ids[:, first:last], cache)[:, -1] for first, last in PIECES]
    assert all(mx.array_equal(a, b) for a, b in zip(found[: len(PIECES)], found[len(PIECES) :], strict=True))
    assert off(inside["pattern", 1].sum(axis=-1), 1.0) < 1e-5
    assert off(inside["pattern", 0], inspect(model, ids[0].tolist(), "pattern")["pattern", 0]) < 0.05


def test_trimmed_tokens_are_forgotten():
    model, ids = dense("mini-4k"), mx.array(ids_of(12))
    with trace(model, keep="resid_post") as inside:
        cache = model.make_cache()
        model(ids, cache)
        for layer in cache:
            layer.trim(4)
        model(ids[:, 8:10], cache)
    assert inside.positions("resid_post", 0) == [*range(10)]
    with trace(model, keep="resid_post") as whole:
        model(ids[:, :10])
    assert off(inside["resid_post", 1], whole["resid_post", 1]) < 1e-4


def test_rows_of_a_padded_cache_are_told_without_their_padding():
    model, ids = dense("mini-4k"), ids_of(30, rows=2)
    with trace(model, keep=["resid_post", "pattern"]) as inside:
        cache = model.make_cache(left_padding=[0, 7])
        padded = ids.copy()
        padded[1, :7] = 0
        padded[1, 7:] = ids[1, :23]
        for first in (0, 25):
            model(mx.array(padded[:, first : first + 25]), cache)
    for row, length in enumerate((30, 23)):
        alone = inspect(model, ids[row, :length].tolist(), ["resid_post", "pattern"])
        for place in ("resid_post", "pattern"):
            assert off(inside[place, 1, row], alone[place, 1]) < 1e-4
    with pytest.raises(OptionError, match="differ in length"):
        inside["resid_post", 1]


# Generation


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def test_a_generation_keeps_what_a_pass_over_its_text_does(tiny):
    model, tokenizer = tiny
    plain = [chunk.token for chunk in stream_generate(model, tokenizer, "A duck", max_tokens=12)]
    with trace(model, keep=["resid_post", "pattern", "logits"]) as inside:
        tokens = [chunk.token for chunk in stream_generate(model, tokenizer, "A duck", max_tokens=12)]
    assert tokens == plain
    ((positions, ids),) = [(inside.positions("resid_post", 0), inside["resid_post", 0].shape[1])]
    assert positions == [*range(ids)]
    prompt = ids - len(tokens) + 1
    read = [*encode_prompt(tokenizer, "A duck"), *tokens[:-1]]
    assert len(read) == ids > prompt
    whole = inspect(model, read, ["resid_post", "pattern", "logits"])
    for layer in range(model.config.num_hidden_layers):
        assert off(inside["resid_post", layer], whole["resid_post", layer]) < 1e-3
        assert off(inside["pattern", layer], whole["pattern", layer]) < 1e-3
    assert inside.positions("logits") == [*range(prompt - 1, ids)]
    assert off(inside["logits"], whole["logits"][:, prompt - 1 :]) < 1e-3


def test_a_batch_keeps_each_prompts_rows(tiny):
    model, tokenizer = tiny
    prompts = ["A duck", "Tell me of a frog and an owl who had a cake", "Why"]
    odd = {"layers": 1, "positions": slice(1, None, 2)}
    keep = [Keep("resid_post", layers=1), Keep("head_out", **odd), Keep("pattern", **odd), "logits"]
    with trace(model, keep=keep) as inside:
        texts = batch_generate(model, tokenizer, prompts, max_tokens=20)
    assert inside.rows == 3
    for row, prompt in enumerate(prompts):
        with trace(model, keep=keep) as alone:
            assert generate(model, tokenizer, prompt, max_tokens=20) == texts[row]
        assert inside.positions("resid_post", 1, row) == alone.positions("resid_post", 1)
        for place in ("resid_post", "head_out", "pattern"):
            assert off(inside[place, 1, row], alone[place, 1]) < 1e-3
        assert off(inside["logits", None, row], alone["logits"]) < 1e-3


def test_other_threads_are_not_looked_into(tiny):
    import threading

    model, _ = tiny
    with trace(model, keep="embed") as inside:
        thread = threading.Thread(target=lambda: mx.eval(model(mx.array([[1, 2, 3]]))))
        thread.start()
        thread.join()
        assert inside.rows == 0
        model(mx.array([[1, 2, 3, 4]]))
    assert inside["embed"].shape[1] == 4
    model(mx.array([[1, 2, 3, 4]]))
    assert inside.rows == 1


# Refusals


def test_what_is_not_there_is_refused_by_name():
    model = dense("mini-4k")
    for keep, message in [
        ("residual", "place 'residual' is none of this model; places are embed, resid_pre"),
        ("router", "none of this model"),
        (Keep("embed", layers=0), "in no layer"),
        (Keep("resid_pre", layers=3), "layer 3 is not there; the model has 3"),
        (Keep("resid_pre", heads=0), "has no heads"),
        (Keep("k", heads=2), "head 2 is not there"),
        (Keep("k", positions="last"), "positions"),
        (["q", Keep("q", layers=1)], "kept twice"),
    ]:
        with pytest.raises(OptionError, match=message), trace(model, keep=keep):
            raise AssertionError
    with pytest.raises(PromptError, match="vocabulary"):
        inspect(model, [1, 2, 500], "embed")
    for ids in ([], [[1, 2], []], [[1], 2], [1.5], [[[1]]], mx.ones(3), "text", 5):
        with pytest.raises(PromptError, match="ids is"):
            inspect(model, ids, "embed")


def test_more_than_fits_is_refused_with_the_way_out(monkeypatch):
    from phi3_mlx import memory_limit
    from phi3_mlx.engine import machine

    model = dense("mini-4k")
    monkeypatch.setattr(machine, "_of_machine", lambda: 1 << 40)
    ids = ids_of(900)[0].tolist()
    weights = sum(array.nbytes for _, array in __import__("mlx.utils").utils.tree_flatten(model.parameters()))
    with memory_limit(mx.get_active_memory() + weights // 4 + (24 << 20)):
        with pytest.raises(MemoryLimitError, match="keep fewer layers, heads or positions"):
            inspect(model, ids, ["pattern", "head_out"])
        with (
            trace(model, keep=["pattern", "head_out", "act", "z"]),
            pytest.raises(MemoryLimitError, match="keep fewer"),
        ):
            model(mx.array([ids * 4]))
        few = inspect(model, ids, [Keep("pattern", positions=-1)])
    assert few["pattern", 2].shape == (1, 2, 1, 900)


def test_a_model_of_another_family_is_refused(tmp_path):
    import other_models

    with pytest.raises(OptionError):
        places(other_models)


def test_the_window_leaves_probabilities_of_0_where_keys_are_gone():
    model = dense("mini-4k")
    length = 5 * WINDOW + 600
    inside = inspect(model, ids_of(length)[0].tolist(), [Keep("pattern", layers=0, positions=[-1])])
    row = np.array(inside["pattern", 0])[0, :, 0]
    assert (row[:, : length - WINDOW] == 0).all()
    assert abs(row[:, length - WINDOW :].sum(axis=1) - 1).max() < 1e-5


def test_build_is_lazy():
    """A model whose weights were never computed has places too."""
    assert "resid_mid" in places(build(parse_config(CONFIGS["mini-4k"])))
