"""Ready tools over traces: lens, attribution, patching of values and paths, scores of heads."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from oracle import ORIGINAL, ids_of
from test_inside import MODELS, off

from phi3_mlx import (
    Keep,
    attribute,
    inspect,
    load,
    logit_difference,
    logit_lens,
    measure_edits,
    patch,
    patch_heads,
    patch_paths,
    patch_positions,
    score_heads,
    switch_off,
    trace,
)
from phi3_mlx.errors import OptionError
from phi3_mlx.models import build, parse_config

METRIC = logit_difference(3, 5)


@functools.cache
def tiny():
    return load("tiny")


MODELS = {**MODELS, "tiny": lambda: tiny()[0]}


def pair(length: int = 12, first: int = 4) -> tuple[list[int], list[int]]:
    """Two prompts that differ at two positions from `first` on."""
    clean = ids_of(length)[0].tolist()
    corrupted = [*clean]
    for position in (first, first + 1):
        corrupted[position] = (clean[position] + 7) % 90
    return clean, corrupted


def metric_of(model, ids, edits=()) -> float:
    """What METRIC gives for a run by itself."""
    with trace(model, edits=edits):
        logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
    return float(logits[3] - logits[5])


# The lens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [7, ORIGINAL + 3])
def test_the_lens_of_the_last_layer_is_the_model_itself(name, length):
    model, ids = MODELS[name](), ids_of(length, rows=2) % 90
    expected = model(mx.array(ids))
    lens = logit_lens(model, ids.tolist())
    assert off(lens.logits()[-1], expected) < 1e-4
    assert lens.layers == list(range(model.config.num_hidden_layers))
    some = logit_lens(model, ids.tolist(), layers=[-1, 0], positions=[2, -1])
    assert some.positions == [2, length - 1]
    assert off(some.logits()[0], expected[:, [2, length - 1]]) < 1e-4
    assert np.abs(np.array(some.logits()[1] - some.logits()[0])).max() > 0.1


def test_the_lens_reads_each_layer_by_the_last_norm_and_the_head():
    model, ids = MODELS["small"](), ids_of(9)[0].tolist()
    inside = inspect(model, ids, ["resid_mid", "resid_post"])
    for place in ("resid_mid", "resid_post"):
        lens = logit_lens(model, ids, place=place)
        for layer, logits in enumerate(lens.logits()):
            assert off(logits, model.head(model.model.final_layernorm(inside[place, layer]))) < 1e-5


def test_ranks_and_likeliest_tokens_are_those_of_a_sorted_list():
    model, ids = MODELS["mini-4k"](), ids_of(6, rows=2)
    lens = logit_lens(model, ids.tolist())
    logits = np.array(lens.logits(), dtype=np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    order = np.argsort(-logits, axis=-1, kind="stable")
    top, scores = lens.top(3)
    assert np.array_equal(np.array(top), order[..., :3])
    assert off(scores, np.take_along_axis(log_p, order[..., :3], -1)) < 1e-4
    places = np.argsort(order, axis=-1)
    assert np.array_equal(np.array(lens.ranks(11)), places[..., 11])
    assert np.array_equal(
        np.array(lens.ranks(ids.tolist())), np.take_along_axis(places, ids[None, ..., None], -1)[..., 0]
    )
    likeliest = np.broadcast_to(order[-1:, :, :, :1], (*order.shape[:3], 1))
    assert np.array_equal(np.array(lens.ranks()), np.take_along_axis(places, likeliest, -1)[..., 0])
    assert not np.array(lens.ranks())[-1].any()
    assert off(lens.log_probabilities(11), log_p[..., 11]) < 1e-4


def test_positions_are_read_a_few_at_a_time(monkeypatch):
    from phi3_mlx.interpret import lens

    model, ids = MODELS["mini-4k"](), ids_of(11, rows=2).tolist()
    expected = logit_lens(model, ids)
    whole, ranks = expected.logits(), expected.ranks()
    monkeypatch.setattr(lens, "positions_at_once", lambda size: 3)
    assert off(logit_lens(model, ids).logits(), whole) < 1e-5
    assert mx.array_equal(logit_lens(model, ids).ranks(), ranks)


# Attribution


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [5, ORIGINAL + 2])
def test_what_the_parts_add_is_the_logit(name, length):
    model, ids = MODELS[name](), ids_of(length, rows=2) % 90
    logits = np.array(model(mx.array(ids)), dtype=np.float64)
    found = attribute(model, ids.tolist(), 3)
    assert off(found.logit, logits[:, -1, 3]) < 1e-4
    assert off(found.total, logits[:, -1, 3]) < 1e-4 * max(1, np.abs(logits).max())
    found = attribute(model, ids.tolist(), [3, 7], against=[5, 11], position=2)
    expected = [logits[0, 2, 3] - logits[0, 2, 5], logits[1, 2, 7] - logits[1, 2, 11]]
    assert off(found.logit, expected) < 1e-4
    assert off(found.total, expected) < 1e-4 * max(1, np.abs(logits).max())
    if name not in ("small", "moe"):  # no bias
        assert off(found.heads.sum(axis=2), found.attention) < 1e-4
    assert np.abs(np.array(found.heads)).max() > 1e-3


def test_a_part_is_what_its_own_stream_would_read_at_the_measured_scale():
    model, ids = MODELS["mini-4k"](), ids_of(9)[0].tolist()
    inside = inspect(model, ids, ["final_in", "head_out", "mlp_out"])
    stream = np.array(inside["final_in"][0, -1], dtype=np.float64)
    weight = np.array(model.model.norm.weight, dtype=np.float64)
    rows = np.array(model.lm_head.weight, dtype=np.float64)
    read = weight * (rows[3] - rows[5]) / np.sqrt((stream**2).mean() + model.config.rms_norm_eps)
    found = attribute(model, ids, 3, 5)
    for layer in range(model.config.num_hidden_layers):
        assert off(found.mlp[0, layer], np.array(inside["mlp_out", layer])[0, -1] @ read) < 1e-4
        assert off(found.heads[0, layer], np.array(inside["head_out", layer])[0, -1] @ read) < 1e-4


def test_tokens_that_are_none_are_refused():
    model = MODELS["mini-4k"]()
    for token in (-1, 160, [1, 2], True, "a", []):
        with pytest.raises(OptionError, match="token"):
            attribute(model, [1, 2, 3], token)


# Runs side by side


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [9, ORIGINAL + 2])
def test_runs_side_by_side_are_runs_alone(name, length):
    model, ids = MODELS[name](), (ids_of(length)[0] % 90).tolist()
    other = inspect(model, ids[::-1], ["resid_post", "z", "pattern"])
    several = inspect(model, [ids[3:] + ids[:3], *[ids] * 7], "resid_post")
    variants = [
        [],
        [switch_off(0, 1)],
        [switch_off(1, 0, positions=-1), patch("resid_post", other, layers=0, positions=[0, 2])],
        [patch("resid_post", other, layers=1)],
        [patch("pattern", other, layers=1, heads=1)],
        [patch("resid_post", several, layers=1)],  # its first row, as in a run alone
    ]
    alone = [metric_of(model, ids, edits) for edits in variants]
    for batch in (1, 3, 8):
        assert off(measure_edits(model, ids, variants, METRIC, batch=batch), alone) < 1e-4
    assert len({round(value, 3) for value in alone}) == len(alone)


def test_what_measures_nothing_is_refused():
    model = MODELS["mini-4k"]()
    with pytest.raises(OptionError, match="a number for each run"):
        measure_edits(model, [1, 2], [[]], lambda logits: logits)
    with pytest.raises(OptionError, match="one sequence"):
        measure_edits(model, [[1, 2], [3, 4]], [[]], METRIC)
    with pytest.raises(OptionError, match="batch"):
        measure_edits(model, [1, 2], [[]], METRIC, batch=0)
    with pytest.raises(OptionError, match="make edits with"):
        measure_edits(model, [1, 2], [["z"]], METRIC)
    assert measure_edits(model, [1, 2], [], METRIC).shape == (0,)


def test_ids_outside_the_vocabulary_are_refused_where_logits_are_read():
    model = MODELS["mini-4k"]()
    size, lens = model.config.vocab_size, logit_lens(model, [1, 2])
    for wrong in (size, -1):
        with pytest.raises(OptionError, match=f"token {wrong} is outside the vocabulary of {size}"):
            measure_edits(model, [1, 2], [[]], logit_difference(3, wrong))
        for ask in (lens.ranks, lens.log_probabilities):
            for ids in (wrong, [[5, wrong]]):
                with pytest.raises(OptionError, match=f"token {wrong} is outside the vocabulary"):
                    ask(ids)
    assert lens.ranks(size - 1).shape == (3, 1, 2)
    assert measure_edits(model, [1, 2], [[]], logit_difference(0, size - 1)).shape == (1,)


# Patches


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [12, ORIGINAL + 2])
def test_patching_the_whole_stream_restores_the_clean_run_exactly(name, length):
    model, (clean, corrupted) = MODELS[name](), pair(length)
    for place in ("resid_pre", "resid_post"):
        grid = patch_positions(model, clean, corrupted, METRIC, place=place, positions=[range(length)], batch=1)
        assert grid.clean != grid.corrupted
        assert (np.array(grid.values) == grid.clean).all(), place
        assert (np.array(grid.restored) == 1).all()


@pytest.mark.parametrize("name", ["mini-4k", "moe"])
def test_each_cell_is_the_run_with_that_patch(name):
    model, (clean, corrupted) = MODELS[name](), pair()
    inside = inspect(model, clean, ["resid_mid", "q"])
    grid = patch_positions(model, clean, corrupted, METRIC, place="resid_mid", layers=[1, 0], positions=[1, 4, [5, -1]])
    assert (grid.rows, grid.columns) == ([1, 0], [[1], [4], [5, 11]])
    for values, layer in zip(grid.values.tolist(), grid.rows, strict=True):
        for value, group in zip(values, grid.columns, strict=True):
            assert (
                off(value, metric_of(model, corrupted, [patch("resid_mid", inside, layers=layer, positions=group)]))
                < 1e-4
            )
    assert (np.array(grid.values)[:, 0] == grid.corrupted).all()  # nothing differs there yet
    assert np.abs(np.array(grid.values)[-1, 1] - grid.corrupted) > 1e-4
    assert off(grid.clean, metric_of(model, clean)) < 1e-5
    assert off(grid.corrupted, metric_of(model, corrupted)) < 1e-5
    heads = patch_heads(model, clean, corrupted, METRIC, place="q", layers=-1, positions=[-1])
    for head, value in enumerate(heads.values[0].tolist()):
        edit = patch("q", inside, layers=model.config.num_hidden_layers - 1, heads=head, positions=-1)
        assert off(value, metric_of(model, corrupted, [edit])) < 1e-4


def test_what_does_not_differ_has_nothing_to_restore():
    model, (clean, _) = MODELS["mini-4k"](), pair()
    grid = patch_heads(model, clean, clean, METRIC, layers=0)
    assert (np.array(grid.values) == grid.clean).all()
    with pytest.raises(OptionError, match=r"both runs have the metric .* nothing to restore"):
        _ = grid.restored


def test_a_column_for_each_position_if_none_are_named():
    model, (clean, corrupted) = MODELS["mini-4k"](), pair()
    grid = patch_positions(model, clean, corrupted, METRIC, layers=0)
    assert grid.columns == [[position] for position in range(12)]
    assert off(grid.restored[0, [4, 5]].sum(), grid.restored[0].sum()) < 1e-4  # the embeddings differ there alone


def test_patches_that_cannot_be_are_refused():
    model, (clean, corrupted) = MODELS["mini-4k"](), pair()
    with pytest.raises(OptionError, match="one length"):
        patch_positions(model, clean, corrupted[:-1], METRIC)
    with pytest.raises(OptionError, match="position 12"):
        patch_positions(model, clean, corrupted, METRIC, positions=[12])
    for positions in ([[]], []):
        with pytest.raises(OptionError, match="positions has"):
            patch_positions(model, clean, corrupted, METRIC, positions=positions)
    with pytest.raises(OptionError, match="has no heads"):
        patch_heads(model, clean, corrupted, METRIC, place="resid_pre")


# Paths


@pytest.mark.parametrize("name", ["mini-4k", "moe", "small"])
def test_the_direct_path_to_the_logits_is_what_the_head_adds(name):
    model, (clean, corrupted) = MODELS[name](), pair()
    right, wrong = (inspect(model, ids, ["head_out", "final_in"]) for ids in (clean, corrupted))
    grid = patch_paths(model, clean, corrupted, METRIC, Keep("final_in"), through_mlps=False)
    assert grid.rows == list(range(model.config.num_hidden_layers))
    for layer in grid.rows:
        for head in grid.columns:
            added = right["head_out", layer][0, -1, head] - wrong["head_out", layer][0, -1, head]
            logits = model.head(model.model.last_norm(wrong["final_in"][0, -1] + added)[None])[0]
            assert off(grid.values[layer, head], logits[3] - logits[5]) < 1e-4


def test_a_path_to_a_heads_queries_is_two_runs_by_hand():
    model, (clean, corrupted) = MODELS["mini-4k"](), pair()
    right, wrong = (inspect(model, ids, "z") for ids in (clean, corrupted))
    receiver = Keep("q", layers=2, heads=1, positions=[-1])
    grid = patch_paths(model, clean, corrupted, METRIC, [receiver], positions=slice(4, None), batch=3)
    assert grid.rows == [0, 1]
    for layer in grid.rows:
        for head in grid.columns:
            held = [patch("z", wrong, layers=i) for i in range(3)]
            sent = patch("z", right, layers=layer, heads=head, positions=slice(4, None))
            heard = inspect(model, corrupted, receiver, [*held, sent])
            expected = metric_of(model, corrupted, [patch("q", heard, layers=2, heads=1, positions=[-1])])
            assert off(grid.values[layer, head], expected) < 1e-4
    assert np.abs(np.array(grid.values) - grid.corrupted).max() > 1e-3


def test_receivers_that_hear_nothing_are_refused():
    model, (clean, corrupted) = MODELS["mini-4k"](), pair()
    for receivers in ([], Keep("z"), Keep("embed"), Keep("q", layers=0), ["q"]):
        with pytest.raises(OptionError, match="receivers"):
            patch_paths(model, clean, corrupted, METRIC, receivers)
    assert patch_paths(model, clean, corrupted, METRIC, Keep("mlp_in", layers=0)).rows == [0]


# Scores of heads

KINDS, ROTATED = 48, 16  # tokens of a vocabulary, rotated numbers of a head


def with_an_induction_head():
    """Head 0 of layer 0 finds the token before; head 0 of layer 1 what followed the same token. The others are off.

    The stream has a token's own number, that of the token before it, and a 1.
    """
    width, head = 128, 64
    raw = {
        "model_type": "phi3",
        "vocab_size": KINDS,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2.0,
        "partial_rotary_factor": ROTATED / head,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    own, before, one = np.arange(KINDS), KINDS + np.arange(KINDS), 2 * KINDS
    free = ROTATED + np.arange(KINDS)  # numbers of a head that are not rotated
    embedding = np.zeros((KINDS, width))
    embedding[own, own] = embedding[:, one] = 1
    qkv, output = np.zeros((2, 6 * head, width)), np.zeros((2, width, 2 * head))
    angles = 2.0 ** (-np.arange(ROTATED // 2) / (ROTATED // 2))
    # A query is turned back by one token, so it fits the key of the token before best.
    qkv[0, : ROTATED // 2, one], qkv[0, ROTATED // 2 : ROTATED, one] = 10 * np.cos(angles), -10 * np.sin(angles)
    qkv[0, 2 * head : 2 * head + ROTATED // 2, one] = 1
    qkv[0, 4 * head + free, own] = 1
    output[0, before, free] = 0.2
    qkv[1, free, own], qkv[1, 2 * head + free, before], qkv[1, 4 * head + free, own] = 10, 1, 1
    output[1, own, free] = 1
    head_rows = np.zeros((KINDS, width))
    head_rows[own, own] = 1
    model = build(parse_config(raw))
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head_rows, "model.norm.weight": np.ones(width)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.self_attn.qkv_proj.weight"] = qkv[layer]
        weights[f"{prefix}.self_attn.o_proj.weight"] = output[layer]
        weights[f"{prefix}.mlp.gate_up_proj.weight"] = np.zeros((64, width))
        weights[f"{prefix}.mlp.down_proj.weight"] = np.zeros((width, 32))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = np.ones(width)
    model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in weights.items()])
    return model


# Without a prefix the first token takes itself for the token before it, so one query in 20 has two answers.
@pytest.mark.parametrize(("prefix", "least"), [((), 0.97), ((46, 47), 0.999)])
def test_a_known_induction_head_is_found_and_no_other(prefix, least):
    scores = score_heads(with_an_induction_head(), length=20, rows=3, prefix=prefix, tokens=range(46))
    induction, previous = np.array(scores.induction), np.array(scores.previous)
    assert induction[1, 0] > least
    assert previous[0, 0] > 0.99
    induction[1, 0] = previous[0, 0] = 0
    assert max(induction.max(), previous.max()) < 0.06  # those that are off look everywhere alike
    copying = np.array(scores.copying)
    assert copying[1, 0] > 1
    copying[1, 0] = 0
    assert np.abs(copying).max() < 0.1


def test_copying_is_what_attribution_says_of_the_tokens_looked_at():
    model = MODELS["small"]()
    length, size = 3, model.config.vocab_size
    scores = score_heads(model, length=length, rows=1, seed=4, tokens=range(40))
    draw = mx.random.permutation(40, key=mx.random.split(mx.random.key(4), 1)[0])[:length].tolist()
    ids, expected = [*draw, *draw], 0.0
    inside = inspect(model, ids, "pattern")
    for query in range(length, 2 * length):
        added = np.stack([np.array(attribute(model, ids, token, position=query).heads[0]) for token in range(size)])
        for key in range(query + 1):
            weight = np.stack(
                [np.array(inside["pattern", layer])[0, :, query, key] for layer in range(len(model.layers))]
            )
            expected = expected + weight * (added[ids[key]] - added.mean(axis=0)) / length
    assert off(scores.copying, expected) < 1e-4


def test_the_same_seed_scores_alike_and_too_few_tokens_are_refused():
    model = MODELS["mini-4k"]()
    one, two, other = (score_heads(model, length=8, rows=2, seed=seed) for seed in (1, 1, 2))
    assert mx.array_equal(one.induction, two.induction)
    assert not mx.array_equal(one.induction, other.induction)
    for options in ({"length": 1}, {"length": 161}, {"rows": 0}, {"length": 3, "tokens": [4, 5]}):
        with pytest.raises(OptionError, match="cannot be drawn"):
            score_heads(model, **options)
