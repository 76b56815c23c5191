"""Edits: own values change nothing, others what a run with them gives; in generation, batches, caches, gradients."""

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from oracle import ORIGINAL, ids_of
from test_inside import MODELS, dense, keys_of, off

from phi3_mlx import (
    Conversation,
    Keep,
    PrefixStore,
    PromptCache,
    batch_generate,
    change,
    generate,
    inspect,
    load,
    patch,
    places,
    steer,
    stream_generate,
    switch_off,
    trace,
)
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import CacheError, OptionError

PROMPT = "Tell me a story about a duck and a frog."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def vector_of(width: int, seed: int = 0) -> mx.array:
    return mx.random.normal((width,), key=mx.random.key(seed))


# One pass


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 7, 30, ORIGINAL, ORIGINAL + 4])
def test_a_places_own_value_changes_no_bit(name, length):
    model, ids = MODELS[name](), mx.array(ids_of(length, rows=2))
    names = [place for place in places(model) if place != "blocks"]
    expected = model(ids)
    with trace(model, keep=names) as inside:
        assert mx.array_equal(model(ids), expected)
    for place in names:
        with trace(model, edits=patch(place, inside)):
            assert mx.array_equal(model(ids), expected), place
        with trace(model, edits=[change(place, lambda x: x + 0), patch(place, inside, positions=[0, -1])]):
            assert mx.array_equal(model(ids), expected), place
    some = slice(2 if length > 2 else 0, 9)
    with trace(model, edits=[patch("pattern", inside, heads=[1], positions=some), patch("z", inside, heads=0)]):
        assert mx.array_equal(model(ids), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_where_the_model_goes_on_from(name):
    """A value from another text at the last layer's place gives that text's logits, or changes them."""
    model, length = MODELS[name](), ORIGINAL + 4
    ids, others = (mx.array(ids_of(length, seed=seed)) for seed in (0, 1))
    names = [place for place in places(model) if place not in ("blocks", "experts")]
    with trace(model, keep=names) as inside:
        expected = model(others)
    plain = model(ids)
    for place in ("embed", "final_in", "final_norm", "logits"):
        with trace(model, edits=patch(place, inside)):
            assert off(model(ids), expected) < 1e-4, place
    with trace(model, edits=patch("resid_post", inside, layers=-1)):
        assert off(model(ids), expected) < 1e-4
    with trace(model, edits=patch("resid_pre", inside, layers=0)):
        assert off(model(ids), expected) < 1e-4
    with trace(model, edits=[patch("q_rot", inside), patch("k_rot", inside), patch("v", inside)], keep="z") as same:
        model(ids)
    assert off(same["z", 1], inside["z", 1]) < 1e-4
    for place in names:
        with trace(model, edits=patch(place, inside)):
            assert off(model(ids), plain) > 1e-3, place


def test_a_pattern_and_heads_contributions_act_as_if_they_were_computed():
    model, ids = dense("phi-4-mini"), mx.array(ids_of(30))
    with trace(model, keep=["pattern", "v", "z", "head_out", "attn_out"]) as plain:
        model(ids)
    uniform = mx.tril(mx.ones((30, 30))) / mx.arange(1, 31)[:, None]
    with trace(model, edits=patch("pattern", uniform, layers=1, heads=2), keep="z") as inside:
        model(ids)
    mixed = uniform @ plain["v", 1][0, :, 0]
    assert off(inside["z", 1][0, :, 2], mixed) < 1e-4
    assert off(inside["z", 1][0, :, :2], plain["z", 1][0, :, :2]) < 1e-5
    with trace(model, edits=patch("head_out", 0.0, layers=0, heads=[1]), keep="attn_out") as without:
        model(ids)
    with trace(model, edits=switch_off(0, [1]), keep="attn_out") as off_head:
        model(ids)
    assert off(without["attn_out", 0], plain["attn_out", 0] - plain["head_out", 0][:, :, 1]) < 1e-4
    assert off(off_head["attn_out", 0], without["attn_out", 0]) < 1e-4


def test_the_input_of_a_norm_is_changed_and_not_the_stream():
    model, ids = dense("mini-4k"), mx.array(ids_of(9))
    keep = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    for place, stream, added in (("attn_in", "resid_pre", "attn_out"), ("mlp_in", "resid_mid", "mlp_out")):
        with trace(model, edits=patch(place, 0.5, layers=1), keep=keep) as inside:
            model(ids)
        after = {"attn_in": "resid_mid", "mlp_in": "resid_post"}[place]
        assert off(inside[stream, 1] + inside[added, 1], inside[after, 1]) < 1e-6
        with trace(model, keep=keep) as plain:
            model(ids)
        assert mx.array_equal(inside[stream, 1], plain[stream, 1])
        assert off(inside[added, 1], plain[added, 1]) > 0.01


def test_an_edit_does_not_write_into_what_another_place_kept():
    model, ids = dense("mini-4k"), mx.array(ids_of(9))
    with trace(model, keep="resid_pre") as plain:
        model(ids)
    with trace(model, edits=patch("attn_in", 3.0, layers=1, positions=[2]), keep="resid_pre") as inside:
        model(ids)
    assert mx.array_equal(inside["resid_pre", 1], plain["resid_pre", 1])


def test_edits_run_in_their_order_and_nested_ones_inside():
    model, ids = dense("mini-4k"), mx.array(ids_of(6))
    twice, plus = change("embed", lambda x: 2 * x), change("embed", lambda x: x + 1)
    with trace(model, keep="embed") as plain:
        model(ids)
    with trace(model, edits=[twice, plus], keep="embed") as inside:
        model(ids)
    assert mx.array_equal(inside["embed"], 2 * plain["embed"] + 1)
    with trace(model, edits=[plus], keep="embed") as outer, trace(model, edits=[twice], keep="embed") as inner:
        model(ids)
    assert mx.array_equal(inner["embed"], 2 * (plain["embed"] + 1))
    assert mx.array_equal(outer["embed"], inner["embed"])


def test_everything_comes_off_after_an_error_too():
    model, ids = dense("mini-4k"), mx.array(ids_of(6))
    expected = model(ids)

    def fails(x: mx.array) -> mx.array:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), trace(model, edits=change("z", fails, layers=2)):
        model(ids)
    assert mx.array_equal(model(ids), expected)
    with pytest.raises(OptionError, match="must keep the shape"), trace(model, edits=change("z", lambda x: x[:, :2])):
        model(ids)
    assert mx.array_equal(model(ids), expected)
    traced = trace(model, edits=patch("embed", 0.0))  # one that ends in another thread than it began in
    traced.__enter__()
    assert not mx.array_equal(model(ids), expected)
    thread = threading.Thread(target=lambda: traced.__exit__(None, None, None))
    thread.start()
    thread.join()
    assert mx.array_equal(model(ids), expected)


def test_another_thread_runs_the_model_as_it_is():
    model, ids, seen = dense("mini-4k"), mx.array(ids_of(6)), []
    expected = np.array(model(ids))
    with trace(model, edits=patch("embed", 0.0)):
        thread = threading.Thread(target=lambda: seen.append(np.array(model(mx.array(ids_of(6))))))
        thread.start()
        thread.join()
        assert off(model(ids), expected) > 0.1
    assert (seen[0] == expected).all()


def test_training_steps_are_refused():
    model, ids = dense("mini-4k"), mx.array(ids_of(6))
    with trace(model, edits=patch("embed", 0.0)), pytest.raises(OptionError, match="cannot be traced"):
        model.model.end_to_end(ids, [6])


def test_what_cannot_be_an_edit_is_refused():
    model = dense("mini-4k")
    with trace(model, keep=Keep("z", layers=0, heads=1, positions=[0])) as inside:
        model(mx.array(ids_of(6)))
    for edits, message in [
        ([3], "edits has 3"),
        (patch("residual", 0.0), "none of this model"),
        (switch_off(9, 0), "layer 9 is not there"),
        (switch_off(0, 2), "head 2 is not there"),
    ]:
        with pytest.raises(OptionError, match=message), trace(model, edits=edits):
            raise AssertionError
    for edit, message in [
        (patch("z", inside, layers=1), "did not keep z of layer 1"),
        (patch("z", inside, layers=0), "did not keep z at position 1"),
        (patch("z", inside, layers=0, positions=0), "did not keep heads"),
        (patch("embed", mx.zeros((1, 2, 192))), "has 2 positions"),
    ]:
        with pytest.raises(OptionError, match=message), trace(model, edits=edit):
            model(mx.array(ids_of(6)))
    for make in (
        lambda: change("z", 3),
        lambda: patch("z", "text"),
        lambda: steer([1.0]),
        lambda: patch("z", 0.0, when="later"),
        lambda: patch("z", 0.0, positions="last"),
        lambda: patch("z", 0.0, positions=slice(None, None, -1)),
    ):
        with pytest.raises(OptionError):
            make()


# Generation


def greedy(model, ids, steps: int, edits) -> list[int]:
    """Token by token, each from a pass over everything before it; the oracle of generation under edits."""
    tokens = list(ids)
    for _ in range(steps):
        with trace(model, edits=edits(len(ids), len(tokens))):
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("when", ["always", "prefill", "decode"])
@pytest.mark.parametrize("name", ["mini-4k", "phi-4-mini", "small"])
def test_generation_under_an_edit_is_whole_passes_under_it(name, when):
    """Over the boundary, where the answer is recomputed; lookup verifies several tokens at once."""
    model, ids = MODELS[name](), ids_of(ORIGINAL - 6)[0].tolist()
    vector = 1.5 * vector_of(model.config.hidden_size)

    def edits(prompt: int, length: int):
        where = {"always": None, "prefill": range(prompt), "decode": range(prompt, length)}[when]
        return [] if where == range(0) else [steer(vector, layers=[0], positions=where)]

    steps = 14
    expected, plain = greedy(model, ids, steps, edits), greedy(model, ids, steps, lambda *_: [])
    assert expected != plain
    steering = [steer(vector, layers=[0], when=when)]
    for options in ({}, {"lookup": 8}, {"prefill_chunk": 5}):
        with trace(model, edits=steering):
            run = Generation(model, [ids], max_tokens=steps, sampling=Sampling(temperature=0.0), **options)
            assert [token.id for token in run] == expected, options
        run = Generation(model, [ids], max_tokens=steps, sampling=Sampling(temperature=0.0), **options)
        assert [token.id for token in run] == plain, options


def test_positions_count_from_the_prompts_end_in_any_chunks():
    model, ids = dense("mini-4k"), ids_of(20)[0].tolist()
    vector = 3 * vector_of(model.config.hidden_size)
    expected = greedy(model, ids, 6, lambda prompt, _: [steer(vector, layers=[1], positions=[prompt - 2, 1])])
    assert expected != greedy(model, ids, 6, lambda *_: [])
    with trace(model, edits=steer(vector, layers=[1], positions=[-2, 1])):
        for chunk in (3, 64):
            run = Generation(model, [ids], max_tokens=6, sampling=Sampling(temperature=0.0), prefill_chunk=chunk)
            assert [token.id for token in run] == expected


def test_patches_of_arrays_and_runs_find_their_positions_in_any_chunks():
    model, ids = dense("mini-4k"), ids_of(20)[0].tolist()
    other = inspect(model, ids_of(20, seed=5)[0].tolist(), "resid_post")
    values = other["resid_post", 1][:, 4:13]
    for edit in (
        patch("resid_post", other, layers=1, positions=slice(4, 13)),
        patch("resid_post", values, layers=1, positions=slice(4, 13)),
        patch("resid_post", values, layers=1, positions=[*range(4, 13)]),
    ):
        whole = inspect(model, ids, "logits", edit)["logits"]
        assert off(whole, inspect(model, ids, "logits")["logits"]) > 0.1
        with trace(model, edits=edit):
            cache = model.make_cache()
            parts = [model(mx.array([ids[first : first + 3]]), cache) for first in range(0, 20, 3)]
        assert off(mx.concatenate(parts, axis=1), whole) < 1e-4


@pytest.mark.parametrize("place", ["pattern", "head_out"])
def test_what_the_kernels_do_not_write_is_computed_where_it_is_changed_alone(place, monkeypatch):
    """An edit of a prompt costs no step behind it, and no other chunk of the prompt."""
    from phi3_mlx.models import layer as layers

    model, ids, lengths = dense("mini-4k"), ids_of(20)[0].tolist(), []
    beside = layers.beside

    def counted(name, compute, rows):
        def noted(*selection):
            result = compute(*selection)
            lengths.append((name, result.shape[1]))
            return result

        return beside(name, noted, rows)

    monkeypatch.setattr(layers, "beside", counted)
    with trace(model, edits=patch(place, 0.0, layers=1, heads=0, positions=[-2])):
        run = Generation(model, [ids], max_tokens=6, sampling=Sampling(temperature=0.0), prefill_chunk=5)
        edited = [token.id for token in run]
    assert lengths == [(place, 5)]
    lengths.clear()
    with trace(model, edits=patch(place, 0.0, layers=1, heads=0, when="decode")):
        list(Generation(model, [ids], max_tokens=6, sampling=Sampling(temperature=0.0)))
    assert lengths == [(place, 1)] * 5
    assert greedy(model, ids, 6, lambda *_: [patch(place, 0.0, layers=1, heads=0, positions=[18])]) == edited


def test_batches_give_each_prompt_what_it_gives_alone(tiny):
    model, tokenizer = tiny
    prompts = [PROMPT, "Why is the owl sad?", "A"]
    edits = [steer(0.6 * vector_of(256), layers=[1, 2]), switch_off(0, [1], when="decode")]
    plain = batch_generate(model, tokenizer, prompts, max_tokens=24)
    with trace(model, edits=edits):
        together = batch_generate(model, tokenizer, prompts, max_tokens=24)
        alone = [generate(model, tokenizer, prompt, max_tokens=24) for prompt in prompts]
        looked_up = [generate(model, tokenizer, prompt, max_tokens=24, lookup=8) for prompt in prompts]
    assert together == alone == looked_up
    assert together != plain
    assert batch_generate(model, tokenizer, prompts, max_tokens=24) == plain


def test_edited_logits_are_drawn_from(tiny):
    model, tokenizer = tiny
    token = tokenizer.encode(" duck")[-1]
    ban = change("logits", lambda x: mx.where(mx.arange(x.shape[-1]) == token, x + 1e4, x), when="always")
    with trace(model, edits=ban):
        tokens = [chunk.token for chunk in stream_generate(model, tokenizer, PROMPT, max_tokens=4)]
    assert tokens == [token] * 4


def test_rows_that_shared_arrays_before_go_on_under_a_trace_that_only_looks(tiny):
    model, _ = tiny
    ids = mx.array(ids_of(12, rows=3))
    caches, others = ([model.make_cache() for _ in range(3)] for _ in range(2))
    for rows in (caches, others):
        for row, cache in enumerate(rows):
            model(ids[row : row + 1], cache)
        for _ in range(12):
            mx.eval(model.model.together(ids[:, :1].reshape(1, 3), [1, 1, 1], rows))
    expected = model.model.together(ids[:, :1].reshape(1, 3), [1, 1, 1], others)
    with trace(model, keep="resid_post") as inside:
        found = model.model.together(ids[:, :1].reshape(1, 3), [1, 1, 1], caches)
    assert off(found, expected) < 1e-4
    assert inside.rows == 3
    assert inside.positions("resid_post", 0) == [24]
    model.model.together(ids[:, :1].reshape(1, 3), [1, 1, 1], caches)


# Caches


def test_a_prompt_cache_knows_under_which_edits_it_was_read(tiny, tmp_path):
    model, tokenizer = tiny
    vector = 0.8 * vector_of(256)
    edits = [steer(vector, layers=[1])]
    with trace(model, edits=edits):
        expected = [generate(model, tokenizer, text, max_tokens=12) for text in (PROMPT, PROMPT + " Now.")]
        cache = PromptCache(model)
        assert generate(model, tokenizer, PROMPT, max_tokens=12, prompt_cache=cache) == expected[0]
        assert generate(model, tokenizer, PROMPT + " Now.", max_tokens=12, prompt_cache=cache) == expected[1]
        with pytest.raises(CacheError, match="which no file can hold"):
            cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(CacheError, match="was read under 1 edits of the model, and there are none now"):
        generate(model, tokenizer, PROMPT, max_tokens=2, prompt_cache=cache)
    with trace(model, edits=[steer(vector, layers=[1])]), pytest.raises(CacheError, match="1 others"):
        generate(model, tokenizer, PROMPT, max_tokens=2, prompt_cache=cache)
    plain = PromptCache(model)
    generate(model, tokenizer, PROMPT, max_tokens=2, prompt_cache=plain)
    with trace(model, edits=edits), pytest.raises(CacheError, match="under no edits"):
        generate(model, tokenizer, PROMPT, max_tokens=2, prompt_cache=plain)
    with trace(model, keep="embed"):  # who only looks changes nothing
        generate(model, tokenizer, PROMPT, max_tokens=2, prompt_cache=plain)


def test_a_steered_conversation_answers_as_if_it_had_no_cache(tiny):
    """What was said under an edit of answers alone is read anew where it is part of the next prompt."""
    model, tokenizer = tiny
    edits = [steer(0.8 * vector_of(256), layers=[1], when="decode"), switch_off(0, 1, positions=-1)]
    with trace(model, edits=edits):
        cache = PromptCache(model)
        first = generate(model, tokenizer, PROMPT, max_tokens=12, prompt_cache=cache)
        messages = [
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And then?"},
        ]
        second = generate(model, tokenizer, messages, max_tokens=12, prompt_cache=cache)
        assert second == generate(model, tokenizer, messages, max_tokens=12)
        talk = Conversation(model, tokenizer)
        assert "".join(chunk.text for chunk in talk.send(PROMPT, max_tokens=12)) == first
        assert "".join(chunk.text for chunk in talk.send("And then?", max_tokens=12)) == second


def test_a_run_does_not_go_on_without_the_edits_that_it_began_with(tiny):
    model, tokenizer = tiny
    with trace(model, edits=steer(vector_of(256))):
        stream = stream_generate(model, tokenizer, PROMPT, max_tokens=8)
        next(stream)
    with pytest.raises(CacheError, match="edits"):
        list(stream)


def test_stored_prefixes_are_left_alone(tiny):
    model, tokenizer = tiny
    prefixes = PrefixStore("1GB")
    text = PROMPT * 4
    plain = generate(model, tokenizer, text, max_tokens=8, prefixes=prefixes)
    held = prefixes.nbytes
    assert held
    with trace(model, edits=steer(3 * vector_of(256))):
        expected = generate(model, tokenizer, text, max_tokens=8)
        assert generate(model, tokenizer, text, max_tokens=8, prefixes=prefixes) == expected != plain
        assert prefixes.nbytes == held
    assert generate(model, tokenizer, text, max_tokens=8, prefixes=prefixes) == plain


# Gradients


def differences(metric, vector: mx.array, step: float = 1e-2) -> np.ndarray:
    """The gradient by central differences, along the first 6 axes."""
    axes = mx.eye(vector.size)[:6].reshape(6, *vector.shape)
    return np.array(
        [(metric(vector + step * axis) - metric(vector - step * axis)).item() / (2 * step) for axis in axes]
    )


@pytest.mark.parametrize("name", ["mini-4k", "moe", "small", "packed"])
@pytest.mark.parametrize("length", [5, 20])
def test_gradients_go_through_an_edited_run(name, length):
    model = packed() if name == "packed" else MODELS[name]()
    ids, width = mx.array(ids_of(length)), model.config.hidden_size

    def metric(vector: mx.array) -> mx.array:
        edits = [steer(vector, layers=[0], positions=[2]), patch("head_out", 0.0, layers=0, heads=1)]
        with trace(model, edits=edits, keep="resid_post") as inside:
            logits = model(ids)
        return nn.log_softmax(logits[0, -1])[7] + inside["resid_post", 1][0, -1, 3]

    gradient = np.array(mx.grad(metric)(mx.zeros(width)))
    assert np.abs(gradient).max() > 1e-3
    assert np.allclose(gradient.reshape(-1)[:6], differences(metric, mx.zeros(width)), rtol=0.03, atol=3e-3)


def packed():
    model = dense_copy("phi-4-mini")
    nn.quantize(model, 32, 8)
    return model


def dense_copy(name: str):
    import oracle

    return oracle.make_ours({**oracle.CONFIGS[name], "quantization": {"group_size": 32, "bits": 8}})


@pytest.mark.parametrize("name", ["mini-4k", "packed"])
def test_integrated_gradients_add_up_to_the_difference(name):
    """Along the straight way from another text's embedding to this one's. A router jumps on the way, so not there."""
    model = packed() if name == "packed" else MODELS[name]()
    first, last = (inspect(model, ids_of(6, seed=seed)[0].tolist(), "embed")["embed"] for seed in (2, 0))
    ids, steps = mx.array(ids_of(6)), 40

    def metric(embedded: mx.array) -> mx.array:
        with trace(model, edits=patch("embed", embedded)):
            return nn.log_softmax(model(ids)[0, -1])[7]

    gradient = mx.grad(metric)
    total = sum(
        (gradient(first + (step + 0.5) / steps * (last - first)) for step in range(steps)), mx.zeros(last.shape)
    )
    added = ((last - first) * total / steps).sum(axis=-1)[0]  # by token
    difference = float(metric(last) - metric(first))
    assert abs(difference) > 1
    assert added.shape == (6,)
    assert abs(float(added.sum()) - difference) < 0.01 * abs(difference)


@pytest.mark.parametrize("place", ["resid_post", "z", "q", "pattern", "act", "head_out"])
def test_attribution_patching_is_the_effect_of_a_small_patch(place):
    """The gradient by a place's value times the difference is, for small ones, what patching it does."""
    model, ids = dense("phi-4-mini"), mx.array(ids_of(12))
    with trace(model, keep=Keep(place, layers=1)) as inside:
        base = model(ids)[0, -1]
    value = inside[place, 1]

    def metric(x: mx.array) -> mx.array:
        with trace(model, edits=patch(place, x, layers=1)):
            return model(ids)[0, -1, 5]

    gradient = mx.grad(metric)(value)
    small_change = 1e-2 * mx.random.normal(value.shape, key=mx.random.key(1)) * (value != 0)
    effect = metric(value + small_change) - metric(value - small_change)
    assert float(mx.abs(gradient).max()) > 0
    assert abs(float(effect) - 2 * float((gradient * small_change).sum())) < 0.05 * abs(float(effect)) + 2e-3
    assert abs(float(metric(value)) - float(base[5])) < 1e-5


@pytest.mark.long
def test_packed_models_are_edited_as_others(tiny):
    model, _ = tiny
    ids = mx.array([[5, 9, 40, 77, 12, 300]])
    with trace(model, keep=list(places(model))) as inside:
        expected = model(ids)
    for place, layer in keys_of(model):
        with trace(model, edits=patch(place, inside, layers=layer)):
            assert mx.array_equal(model(ids), expected), place
    assert off(inside["head_out", 1].sum(axis=2), inside["attn_out", 1]) < 1e-4
