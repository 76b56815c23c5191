"""The engine against the plainest loop there is, and rows together against rows alone."""

import gc
import itertools
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from oracle import CONFIGS, ORIGINAL, ids_of, make_ours

from phi3_mlx.engine import machine
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.sampler import Sampler, filter_scores
from phi3_mlx.engine.sampler import draw as draw_tokens
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import OptionError, Phi3Error, PromptError
from phi3_mlx.models import decoder

GREEDY = Sampling()
EVAL = mx.eval


@pytest.fixture(scope="module")
def model():
    return make_ours(CONFIGS["3.5-mini"])


@pytest.fixture(scope="module")
def windowed():
    return make_ours(CONFIGS["mini-4k"])


def prompt_of(length, seed=0):
    return ids_of(length, seed=seed)[0].tolist()


def plain_greedy(model, prompt, n):
    """No cache, no chunks, no queue: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids[len(prompt) :]


def run(model, prompts, max_tokens=20, sampling=GREEDY, **options):
    rows = [[] for _ in prompts]
    generation = Generation(model, prompts, max_tokens=max_tokens, sampling=sampling, **options)
    for token in generation:
        rows[token.row].append(token)
    return rows, generation


def ids(tokens):
    return [token.id for token in tokens]


@pytest.mark.parametrize("length", [1, ORIGINAL - 5, ORIGINAL, ORIGINAL + 1])
def test_greedy_is_the_plain_loop_across_the_boundary(model, length):
    (tokens,), _ = run(model, [prompt_of(length)], 12, prefill_chunk=7)
    assert ids(tokens) == plain_greedy(model, prompt_of(length), 12)
    assert [token.finish_reason for token in tokens] == [None] * 11 + ["length"]


def test_greedy_is_the_plain_loop_across_the_window(windowed):
    (tokens,), _ = run(windowed, [prompt_of(15)], 20)
    assert ids(tokens) == plain_greedy(windowed, prompt_of(15), 20)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, seed=3), Sampling(0.8, 0.9, 40, 0.02, 1.3, seed=5)])
@pytest.mark.parametrize("name", ["3.5-mini", "mini-4k"])
def test_rows_together_equal_rows_alone(name, sampling):
    model = make_ours(CONFIGS[name])
    prompts = [prompt_of(n, seed=n) for n in (40, 3, 47, 60)]
    stops = set(range(20, 26))  # some rows end early, so the batch shrinks on the way
    together, _ = run(model, prompts, 24, sampling, stop_ids=stops, prefill_chunk=16)
    lengths = set()
    for prompt, row in zip(prompts, together, strict=True):
        (alone,), _ = run(model, [prompt], 24, sampling, stop_ids=stops)
        assert ids(row) == ids(alone)
        assert row[-1].finish_reason == alone[-1].finish_reason
        assert np.allclose([t.logprob for t in row], [t.logprob for t in alone], atol=1e-3)
        lengths.add(len(row))
    assert len(lengths) > 1


def test_stop_id_ends_the_row_and_is_reported(model):
    expected = plain_greedy(model, prompt_of(9), 12)
    stop = next(t for i, t in enumerate(expected) if i > 2 and t not in expected[:i])
    (tokens,), generation = run(model, [prompt_of(9)], 12, stop_ids={stop})
    assert ids(tokens) == expected[: expected.index(stop) + 1]
    assert tokens[-1].finish_reason == "stop"
    assert generation.statistics.generated_tokens == len(tokens)


def test_logprob_is_the_models_own_whatever_the_sampling(model):
    prompt = prompt_of(12)
    (tokens,), _ = run(model, [prompt], 8, Sampling(1.5, top_k=5, repetition_penalty=1.5, seed=1))
    for i, token in enumerate(tokens):
        logits = np.array(model(mx.array([prompt + ids(tokens)[:i]]))[0, -1], dtype=np.float64)
        assert token.logprob == pytest.approx(logits[token.id] - np.log(np.exp(logits).sum()), abs=1e-3)


def test_the_context_ends_the_answer(model):
    context = model.config.max_position_embeddings
    (tokens,), _ = run(model, [prompt_of(context - 3)], 50)
    assert len(tokens) == 3
    assert tokens[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([5, 160], "token id 160 is outside the model's vocabulary of 160"),
        ([0, 160], "token id 160 is outside the model's vocabulary of 160"),
        ([-1, 5], "token id -1"),
        ([5] * 1536, "1,536 tokens and the model's context is 1,536"),
    ],
)
def test_prompts_that_cannot_run_are_refused(model, prompt, words):
    with pytest.raises(PromptError, match=words):
        Generation(model, [prompt], max_tokens=1, sampling=GREEDY)


def test_a_given_cache_is_extended_and_only_the_rest_is_read(model):
    prompt = prompt_of(40)
    _, first = run(model, [prompt], 1)
    longer = [*prompt, *prompt_of(30, seed=1)]
    (tokens,), second = run(model, [longer], 6, cache=first.cache)
    assert second.statistics.prefilled_tokens == 30
    assert ids(tokens) == plain_greedy(model, longer, 6)
    (tokens,), third = run(model, [prompt], 6, cache=second.cache)
    assert third.statistics.prefilled_tokens == 1  # its logits begin the answer
    assert ids(tokens) == plain_greedy(model, prompt, 6)
    with pytest.raises(ValueError, match="one prompt"):
        Generation(model, [prompt] * 2, max_tokens=1, sampling=GREEDY, cache=third.cache)


def test_a_given_cache_that_the_prompt_takes_over_the_boundary_is_read_again_at_once(model, monkeypatch):
    """The whole prompt's length says its regime before its first chunk, so no chunk is read in both."""
    prompt = prompt_of(ORIGINAL + 30)
    _, first = run(model, [prompt[: ORIGINAL - 20]], 1)
    chunks, through = [], decoder.Decoder._through
    monkeypatch.setattr(
        decoder.Decoder, "_through", lambda self, ids, *rest: chunks.append(ids.size) or through(self, ids, *rest)
    )
    (tokens,), _ = run(model, [prompt], 3, cache=first.cache, prefill_chunk=8)
    assert sum(chunks) == len(prompt) + 2
    monkeypatch.undo()
    assert ids(tokens) == plain_greedy(model, prompt, 3)


@pytest.mark.parametrize("lengths", [[70], [70, 1, 45], [300, 20]])
def test_of_a_prompt_the_last_layer_computes_its_last_token_alone(model, lengths, monkeypatch):
    prompts = [prompt_of(length, seed=seed) for seed, length in enumerate(lengths)]
    widths, feed_forward = [], decoder.DecoderLayer.feed_forward

    def counted(layer, x):
        widths.append(x.shape[1])
        return feed_forward(layer, x)

    monkeypatch.setattr(decoder.DecoderLayer, "feed_forward", counted)
    answers, _ = run(model, prompts, 4, prefill_chunk=1000)
    layers = len(model.layers)
    assert widths[:layers] == [sum(lengths)] * (layers - 1) + [len(lengths)]
    monkeypatch.undo()
    assert [ids(tokens) for tokens in answers] == [plain_greedy(model, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_a_gpu_is_waited_for_by_the_bytes_of_its_queue(model, limit, monkeypatch):
    """All layers but the last, of which a prompt's chunk needs the keys alone; not without a cache, as in training."""
    (expected,), _ = run(model, [prompt_of(12)], 4)
    evaluated = []
    monkeypatch.setattr(decoder, "fused_attention", lambda: True)
    monkeypatch.setattr(decoder, "QUEUED", limit)
    monkeypatch.setattr(decoder.mx, "eval", lambda *arrays: evaluated.append(arrays) or EVAL(*arrays))
    cache = model.make_cache(12)
    model.model(mx.array([prompt_of(12)[:5]]), cache)
    assert len(evaluated) == (0 if limit else len(model.layers) - 1)
    evaluated.clear()
    model.model(mx.array([prompt_of(12)]))
    assert not evaluated
    (tokens,), _ = run(model, [prompt_of(12)], 4)
    assert ids(tokens) == ids(expected)


def test_statistics_count_what_was_done(model):
    seen = []
    _, generation = run(model, [prompt_of(30), prompt_of(10)], 5, prefill_chunk=8, on_prefill=lambda *a: seen.append(a))
    s = generation.statistics
    assert (s.prompt_tokens, s.prefilled_tokens, s.generated_tokens, s.decoded_tokens) == (40, 40, 10, 7)
    # Not decoded: each row's first token, and the one that the first row got while the second was read.
    assert s.prompt_tps > 0
    assert s.decode_tps > 0
    assert s.peak_memory > 0
    assert seen == [(8, 40), (16, 40), (24, 40), (32, 40), (40, 40)]


def test_finish_stops_one_row_and_leaves_the_others(model):
    generation = Generation(model, [prompt_of(5), prompt_of(8)], max_tokens=6, sampling=GREEDY)
    rows = [[], []]
    for token in generation:
        rows[token.row].append(token.id)
        if token.row == 0 and len(rows[0]) == 2:
            generation.finish(0)
    assert rows == [plain_greedy(model, prompt_of(5), 2), plain_greedy(model, prompt_of(8), 6)]


def test_a_row_that_is_finished_amid_a_step_says_nothing_more_of_it(model):
    generation = Generation(model, [prompt_of(5), prompt_of(8)], max_tokens=4, sampling=GREEDY)
    rows = [[], []]
    for token in generation:
        rows[token.row].append(token.id)
        if len(rows[0]) == 2:
            generation.finish(1)
    assert rows == [plain_greedy(model, prompt_of(5), 4), plain_greedy(model, prompt_of(8), 1)]
    assert generation.statistics.generated_tokens == 5


def test_no_room_for_an_answer_yields_nothing(model):
    assert run(model, [prompt_of(5), prompt_of(6)], 0)[0] == [[], []]


def test_nan_is_an_error_not_text(model):
    broken = make_ours(CONFIGS["3.5-mini"])
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    with pytest.raises(Phi3Error, match="NaN"):
        run(broken, [prompt_of(5)])


@pytest.mark.parametrize("lookup", [0, 4], ids=["plain", "nothing to look up"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_next_step_is_queued_before_a_token_is_read_but_for_the_first_on_a_cpu(model, monkeypatch, on_cpu, lookup):
    queued, order = mx.async_eval, []
    monkeypatch.setattr(mx, "async_eval", lambda *a: (order.append("queued"), queued(*a)))
    monkeypatch.setattr(machine, "on_cpu", lambda: on_cpu)
    for token in Generation(model, [prompt_of(5)], max_tokens=4, sampling=GREEDY, lookup=lookup):
        order.append(token.row)
    first = [0, "queued"] if on_cpu else ["queued", 0]
    assert order == ["queued", *first, "queued", 0, "queued", 0, 0]  # the prompt, and each next step before its token


# ------------------------------------------------------------------------------------------ sampling


def naive_filter(logits, temperature, top_k, top_p, min_p):
    """The probabilities transformers' warpers leave, one token at a time in float64."""
    scores = logits.astype(np.float64) / temperature
    kept = set(range(len(scores)))
    by_score = sorted(kept, key=lambda i: -scores[i])
    if top_k:
        kept = set(by_score[:top_k])

    def probabilities():
        e = {i: np.exp(scores[i] - scores.max()) for i in kept}
        return {i: e[i] / sum(e.values()) for i in kept}

    p, total, nucleus = probabilities(), 0.0, set()
    for i in (i for i in by_score if i in kept):
        if total >= top_p:
            break
        nucleus.add(i)
        total += p[i]
    kept = nucleus if top_p < 1 else kept
    p = probabilities()
    kept = {i for i in kept if p[i] >= min_p * max(p.values())}
    return probabilities()


def test_top_p_keeps_no_token_beyond_those_that_reach_it():
    """Also where they reach it exactly: of .5, .25 and .25, p = .5 keeps one, as transformers does."""
    halves = mx.array([[0.0, -math.log(2), -math.log(2)]])
    assert mx.softmax(halves, axis=-1).tolist() == [[0.5, 0.25, 0.25]]
    quarters = mx.zeros((1, 4))
    for scores, p, kept in ((halves, 0.5, 1), (halves, 0.75, 2), (quarters, 0.25, 1), (quarters, 0.5, 2)):
        assert int(mx.isfinite(filter_scores(scores, Sampling(1.0, p))).sum()) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), list(itertools.product([0, 1, 7, 500], [1.0, 0.9, 0.3, 1e-6], [0.0, 0.1, 1.0]))
)
def test_filters_keep_what_the_definition_keeps(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32) * 2
    sampling = Sampling(0.7, top_p, top_k, min_p)
    got = np.array(mx.softmax(filter_scores(mx.array(logits) / 0.7, sampling), axis=-1))
    for row in range(2):
        expected = naive_filter(logits[row], 0.7, min(top_k, 50), top_p, min_p)
        assert set(np.flatnonzero(got[row] > 0)) == set(expected)
        assert np.allclose([got[row][i] for i in expected], list(expected.values()), atol=1e-5)


def test_draws_follow_the_distribution():
    logits = mx.array(np.log([[0.5, 0.3, 0.15, 0.05]]).astype(np.float32))
    sampler = Sampler(Sampling(1.0, seed=0), [0], 4)
    draws = [int(draw_tokens([sampler], logits)[0].item()) for _ in range(4000)]
    counts = np.bincount(draws, minlength=4) / len(draws)
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03  # four standard deviations


def test_the_same_seed_draws_the_same_and_no_seed_does_not(model):
    draw = lambda seed: ids(run(model, [prompt_of(5)], 30, Sampling(1.0, seed=seed))[0][0])  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_without_a_seed_equal_prompts_in_a_batch_differ(model):
    (a, b), _ = run(model, [prompt_of(5)] * 2, 30, Sampling(1.0))
    assert ids(a) != ids(b)


@pytest.mark.parametrize("sampling", [Sampling(1e-40, seed=0), Sampling(1e-5, seed=0), Sampling(1.0, 1e-50, seed=0)])
def test_the_narrowest_settings_take_the_likeliest(sampling):
    logits = mx.array([[3.0, 5.0, 2.0, 4.9]])
    sampler = Sampler(sampling, [0], 4)
    assert {int(draw_tokens([sampler], logits)[0].item()) for _ in range(20)} == {1}


@pytest.mark.parametrize("lookup", [0, 6])
@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"), [(0.7, 0.0, 1.0), (0.0, 0.4, 1.0), (-0.3, 0.6, 1.2), (1.5, -0.5, 1.0)]
)
def test_presence_and_frequency_penalties_are_openais_formula_over_the_answer(
    model, presence, frequency, repetition, lookup
):
    prompt, answer = [*prompt_of(6), *prompt_of(6)], []
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    for _ in range(24):
        logits = np.array(model(mx.array([[*prompt, *answer]]))[0, -1], dtype=np.float64)
        seen = sorted({*prompt, *answer})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        for token in {*answer}:
            logits[token] -= answer.count(token) * frequency + presence
        answer.append(int(logits.argmax()))
    (tokens,), _ = run(model, [prompt], 24, Sampling(**penalties), lookup=lookup)
    assert ids(tokens) == answer
    (plain,), _ = run(model, [prompt], 24, Sampling(repetition_penalty=repetition))
    assert ids(plain) != answer


def test_repetition_penalty_counts_prompt_and_answer():
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 1], 4)
    logits = mx.array([[3.0, -1.0, 2.0, -1.5]])
    # 3 -> 1.5, -1 -> -2: token 2 wins; then it is halved too and token 0 wins.
    assert [int(draw_tokens([sampler], logits)[0].item()) for _ in range(2)] == [2, 0]
    # Below zero it multiplies: -1 -> -2, and token 1 wins.
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0], 2)
    assert int(draw_tokens([sampler], mx.array([[-1.0, -1.5]]))[0].item()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_options_outside_their_range_are_refused(options):
    (name,) = options
    with pytest.raises(OptionError, match=name):
        Sampling(**options)


def test_a_run_that_is_over_gives_its_memory_back_at_once(model):
    """And not when Python next looks for cycles: keys and values are the largest thing there is."""
    mx.eval(model.parameters())
    list(Generation(model, [[1, 2, 3]], max_tokens=4, sampling=GREEDY))
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        generation = Generation(model, [[1, 2, 3]], max_tokens=4, sampling=GREEDY)
        list(generation)
        assert mx.get_active_memory() > before
        del generation
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts; give at least one list of token ids"),
        ([[]], {}, "the prompt is empty"),
        (["hi"], {}, "prompts holds 'hi', and not only lists of token ids"),
        ([[5], [5, 1.5]], {}, "prompts holds a list, and not only lists of token ids"),
        ([[5, 10**6]], {}, "token id 1000000 is outside the model's vocabulary"),
        ([[5]], {"sampling": None}, "sampling is None; expected a Sampling"),
        ([[5]], {"max_tokens": "4"}, "max_tokens is '4'; expected a whole number"),
        ([[5]], {"lookup": 33}, "lookup 33 is outside its range; give 0 (off) to 32"),
        ([[5]], {"lookup": -1}, "lookup -1 is outside its range"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_in_a_line(model, prompts, options, message):
    with pytest.raises(Phi3Error, match=re.escape(message)):
        Generation(model, prompts, **{"max_tokens": 4, "sampling": GREEDY, **options})


def test_prompts_may_be_arrays(model):
    plain = [token.id for token in Generation(model, [[5, 6, 7]], max_tokens=4, sampling=GREEDY)]
    assert [token.id for token in Generation(model, mx.array([[5, 6, 7]]), max_tokens=4, sampling=GREEDY)] == plain
