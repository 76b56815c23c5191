"""Log-probabilities of given texts: those of reading each text alone, while what they share is read once."""

import dataclasses
import gc
import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tokenizer_samples
from conftest import ROOT
from oracle import CONFIGS, ORIGINAL, WINDOW, slim
from peaks import fair_peak, peak_of
from test_traffic import MODELS, SAMPLINGS, ids_of

import phi3_mlx
from phi3_mlx.engine import continuations, scheduler, scores
from phi3_mlx.engine.batch import Batch
from phi3_mlx.engine.continuations import Continued, score_together
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError, OptionError, Phi3Error, PromptError
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.text.chat import render_chat, render_training_chat
from phi3_mlx.text.spans import encode_after
from phi3_mlx.text.tokenizer import read_tokenizer

SAME = 1e-4
LENGTHS = [1, 2, WINDOW + 3, ORIGINAL - 6, ORIGINAL - 1, ORIGINAL, 130]


def alone(model, ids, first, bits=None):
    """Of one pass over all ids: log-probabilities of those from `first` on, and whether each is the likeliest."""
    cache = None if bits is None else model.make_cache(len(ids), bits=bits)
    logits = np.array(model(mx.array([ids]), cache)[0].astype(mx.float32)).astype(np.float64)[first - 1 : -1]
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = np.array(ids[first:])
    return logs[np.arange(len(targets)), targets], logs.argmax(axis=-1) == targets


def assert_as_alone(model, continued, scored, bits=None, tolerance=SAME):
    for each, tokens in zip(continued, scored, strict=True):
        logprobs, likeliest = alone(model, each.ids, each.scored_from, bits)
        assert np.abs(logprobs - [token.logprob for token in tokens]).max() < tolerance
        if bits is None:
            assert [token.is_likeliest for token in tokens] == list(likeliest)


def several(model, length, counts=(1, 1, 2, 7, 7, 3, 40, 7)):
    """Continuations of one prompt, some that differ in the last token alone, two that are equal."""
    prompt = ids_of(model, length, 0)
    ends = [ids_of(model, count, seed) for seed, count in enumerate(counts)]
    ends[4] = [*ends[3][:-1], ends[3][-1] + 1]
    return [Continued((*prompt, *end), length) for end in (*ends, ends[5])]


@pytest.fixture
def read_tokens(monkeypatch):
    """Tokens read by each step."""
    steps, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, *given: steps.append(step(self, *given)) or steps[-1])
    return lambda: sum(each.read_tokens for each in steps)


# ------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_each_continuation_scores_as_if_it_was_read_alone(name, length):
    model = MODELS[name]
    continued, other = several(model, length), several(model, 17)
    ours, others = score_together(model, [continued, other])
    assert_as_alone(model, continued, ours)
    assert_as_alone(model, other, others)


@pytest.mark.parametrize("length", [5, WINDOW + 3, ORIGINAL - 2, ORIGINAL + 9])
@pytest.mark.parametrize("name", ["3.5-mini", "long-and-window"])
def test_a_packed_cache_scores_as_one_that_was_read_alone(name, length):
    model, bits = MODELS[name], KVBits(8, 8)
    continued = several(model, length)
    assert_as_alone(model, continued, score_together(model, [continued], kv_bits=bits)[0], bits, 2e-2)
    plain, packed = score_together(model, [continued])[0], score_together(model, [continued], kv_bits=bits)[0]
    assert plain[6] != packed[6]


@pytest.mark.parametrize("length", [ORIGINAL - 8, ORIGINAL - 1, ORIGINAL, 2 * ORIGINAL])
def test_scores_are_those_of_transformers(length):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    raw = slim(CONFIGS["3.5-mini"])
    model = oracle.make_ours(raw)
    theirs = oracle.make_torch(raw, model)
    continued = several(model, length)
    for each, tokens in zip(continued, score_together(model, [continued])[0], strict=True):
        logits = oracle.torch_logits(theirs, np.array([each.ids]))[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [logs[place - 1, each.ids[place]] for place in range(each.scored_from, len(each.ids))]
        assert np.abs(np.array(expected) - [token.logprob for token in tokens]).max() < SAME


@pytest.mark.parametrize("positions", [1, 5])
def test_logits_are_there_for_some_positions_at_a_time(positions, monkeypatch):
    model, sizes = MODELS["3.5-mini"], []
    plain = type(model).logits
    monkeypatch.setattr(scores, "_POSITIONS", 1)
    monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", positions * model.config.vocab_size)
    monkeypatch.setattr(type(model), "logits", lambda self, x, places: sizes.append(len(places)) or plain(self, x))
    continued = several(model, 12)
    (ours,) = score_together(model, [continued])
    assert max(sizes) == positions
    monkeypatch.undo()
    assert_as_alone(model, continued, ours)


# ------------------------------------------------------------------------------------------ what is read


def test_a_prompt_is_read_once_for_all_its_continuations(read_tokens):
    model = MODELS["3.5-mini"]
    prompt = ids_of(model, 300, 0)
    ends = [[i, i + 1, i + 2] for i in range(2, 42)]
    score_together(model, [[Continued((*prompt, *end), 300) for end in ends]])
    assert read_tokens() == 299 + 40 * 3  # each reads the last of the prompt, but not its own last


@pytest.mark.parametrize("length", [ORIGINAL - 6, ORIGINAL - 1])
def test_nothing_is_recomputed_where_some_continuations_cross_the_boundary(length, monkeypatch):
    monkeypatch.delattr(KVCache, "write_row")
    model = MODELS["3.5-mini"]
    continued = several(model, length)
    assert_as_alone(model, continued, score_together(model, [continued])[0])


def test_continuations_of_one_token_are_read_off_the_prompt_alone(read_tokens):
    model = MODELS["3.5-mini"]
    prompt = ids_of(model, 30, 0)
    continued = [Continued((*prompt, end), 30) for end in range(model.config.vocab_size)]
    (ours,) = score_together(model, [continued])
    assert read_tokens() == 30
    assert math.fsum(math.exp(tokens[0].logprob) for tokens in ours) == pytest.approx(1, abs=1e-5)
    assert sum(tokens[0].is_likeliest for tokens in ours) == 1


def test_thousands_of_continuations_are_read_some_at_a_time():
    model = MODELS["mini-4k"]
    mx.eval(model.parameters())
    prompt = ids_of(model, 40, 0)
    continued = [Continued((*prompt, 2 + i % 90, 2 + i // 90, 5), 40) for i in range(2000)]
    some = peak_of(lambda: score_together(model, [continued[:64]]))
    gc.collect()
    before, ours = mx.get_active_memory(), []
    all_of_them = fair_peak(
        lambda: ours.extend(score_together(model, [continued])), lambda peak: peak < 1.2 * some, times=2
    )
    assert all_of_them < 1.2 * some
    assert_as_alone(model, continued[::97], ours[0][::97])
    gc.collect()
    assert mx.get_active_memory() == before


def test_the_peak_of_scoring_stays_under_its_plan(monkeypatch):
    made, together = [], scheduler.plan_together
    monkeypatch.setattr(scheduler, "plan_together", lambda *args: made.append(together(*args)) or made[-1])
    for changes in ({"num_hidden_layers": 6}, {"num_hidden_layers": 2, "vocab_size": 32_064}):
        model = oracle.make_ours({**CONFIGS["3.5-mini"], **changes})
        mx.eval(model.parameters())
        made.clear()

        def fits(taken):
            return taken + made[0].weights < 1.05 * max(plan.total for plan in made) + 250_000

        texts = [several(model, length) for length in (700, 40, 300, 1000, 12, 90)]
        assert fits(fair_peak(lambda model=model, texts=texts: score_together(model, texts), fits))


def test_the_logits_of_many_positions_stay_under_the_plan():
    model = oracle.make_ours({**slim(CONFIGS["3.5-mini"]), "vocab_size": 32_064})
    mx.eval(model.parameters())
    plans = []

    def run():
        runs = Scheduler(model, room=math.inf, chunk=512)
        row = runs.submit(Job(ids_of(model, 600, 0), 0, scored_from=1))
        runs.admit()
        plans.append(runs._plan)
        while runs.busy:
            runs.step()
        assert len(row.scores) == 599

    def fits(peak):
        return peak < 1.05 * (plans[-1].cache + plans[-1].workspace) + 250_000

    assert fits(fair_peak(run, fits))


def test_what_was_scored_holds_no_memory_while_the_rest_is_read(monkeypatch):
    ended, step = [], Scheduler.step

    def watched(runs):
        assert not any(row.begun for row in ended)
        told = step(runs)
        ended.extend(told.ended)
        return told

    monkeypatch.setattr(Scheduler, "step", watched)
    model = MODELS["3.5-mini"]
    score_together(model, [several(model, length) for length in (300, 12, 40, 20)])
    assert len(ended) > 4


def test_fewer_continuations_are_read_at_once_where_memory_is_short(monkeypatch):
    model, branches = MODELS["3.5-mini"], []
    begin = continuations._Group.begin
    monkeypatch.setattr(
        continuations._Group,
        "begin",
        lambda self, runs: begin(self, runs) or branches.append(self._trunk.job.branches),
    )
    continued = several(model, 600, range(1, 30))
    (expected,) = score_together(model, [continued])
    runs = Scheduler(model, chunk=64)  # the smallest
    runs.submit(Job(continued[0].ids[:599], 0, length=629, branches=2))
    runs.admit()
    plan = runs._plan
    del runs
    with phi3_mlx.memory_limit(mx.get_active_memory() + plan.cache + plan.workspace + 200_000):
        (ours,) = score_together(model, [continued])
    assert branches == [16, 2]
    for one, other in zip(ours, expected, strict=True):
        assert [t.logprob for t in one] == pytest.approx([t.logprob for t in other], abs=SAME)
    with phi3_mlx.memory_limit(mx.get_active_memory()):
        with pytest.raises(MemoryLimitError, match="may be used"):
            score_together(model, [continued])
        assert len(score_together(model, [continued], force=True)[0]) == len(continued)


def test_nan_ends_scoring_with_an_error():
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    model.lm_head.weight[7] = math.nan
    with pytest.raises(Phi3Error, match="NaN"):
        score_together(model, [several(model, 12)])


# ------------------------------------------------------------------------------------------ jobs


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("first", [1, 9, 30])
def test_a_job_scores_its_prompt_and_answers_as_before(first, chunk):
    model = MODELS["long-and-window"]
    prompt = ids_of(model, 30, 0)
    plain = Job(prompt, 12, SAMPLINGS[2], kv_bits=None)
    runs = Scheduler(model, room=math.inf, chunk=chunk)
    jobs = [plain, dataclasses.replace(plain, scored_from=first), Job(ids_of(model, 60, 1), 12)]
    rows = [runs.submit(job) for job in jobs]
    while runs.busy:
        runs.step()
    assert rows[0].answer == rows[1].answer
    assert rows[0].scores == []
    if first < 30:
        assert_as_alone(model, [Continued(tuple(prompt), first)], [rows[1].scores])
    else:
        assert rows[1].scores == []


def test_a_job_with_a_cache_that_has_read_more_reads_again_what_it_scores():
    model = MODELS["3.5-mini"]
    prompt, cache = ids_of(model, 30, 0), MODELS["3.5-mini"].make_cache()
    model(mx.array([prompt]), cache)
    runs = Scheduler(model, room=math.inf)
    row = runs.submit(Job(prompt, 0, cache=cache, scored_from=9))
    while runs.busy:
        runs.step()
    assert row.reused == 8
    assert_as_alone(model, [Continued(tuple(prompt), 9)], [row.scores])


def test_a_job_that_pauses_scores_once():
    model = MODELS["3.5-mini"]
    prompt = ids_of(model, 30, 0)
    runs = Scheduler(model, room=math.inf, chunk=8)
    runs.submit(Job(ids_of(model, 13, 1), 30))  # the row is read beside it, in the second pass for the first time
    row = runs.submit(Job(prompt, 3, scored_from=1, candidates=[5, 6]))
    for _ in range(2):
        runs.step()
    runs._batch.remove(row)
    row.pause()
    del runs._workloads[row]
    runs._waiting.append(row)
    while runs.busy:
        runs.step()
    assert len(row.answer) == 3
    assert_as_alone(model, [Continued(tuple(prompt), 1)], [row.scores[:-2]])
    for candidate, score in zip([5, 6], row.scores[-2:], strict=True):
        assert_as_alone(model, [Continued((*prompt, candidate), 30)], [[score]])


@pytest.mark.parametrize("place", [0, 4, -1, 1.5])
def test_a_place_outside_the_prompt_is_refused(place):
    with pytest.raises(OptionError, match="scored_from"):
        Job([5, 6, 7], 1, scored_from=place)


def test_a_job_with_branches_does_not_pause_for_an_older_one(monkeypatch):
    model = MODELS["3.5-mini"]
    runs = Scheduler(model, room=math.inf)
    answers, trunk = runs.submit(Job(ids_of(model, 20, 0))), runs.submit(Job(ids_of(model, 40, 1), 0, branches=2))
    for _ in range(4):
        runs.step()
    monkeypatch.setattr(runs, "_gives_way", lambda lacking: False)
    runs._workloads[answers] = dataclasses.replace(runs._workloads[answers], length=answers.read)
    runs._extend(answers)
    assert trunk.begun
    assert not answers.begun


def test_a_job_with_branches_answers_nothing():
    with pytest.raises(OptionError, match="max_tokens=0"):
        Job([5, 6, 7], 1, branches=2)


# ------------------------------------------------------------------------------------------ texts


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


def assert_ids_score_as_alone(model, prompt, score):
    ids = [*prompt, *score.tokens]
    logprobs, likeliest = alone(model, ids, len(prompt))
    assert score.logprobs == pytest.approx(list(logprobs), abs=SAME)
    assert score.is_greedy == all(likeliest)
    assert score.total == pytest.approx(logprobs.sum(), abs=SAME * len(ids))


def test_a_text_a_chat_and_ids_are_the_same_prompt(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "Tell me a story."}]
    ids, answers = render_chat(tokenizer, messages), ["Once upon a time", " Once", "Once", tokenizer.encode("Once")]
    by_text = phi3_mlx.score(model, tokenizer, "Tell me a story.", answers)
    for prompt in (messages, ids, np.array(ids)):
        assert phi3_mlx.score(model, tokenizer, prompt, answers) == by_text
    assert by_text[2] == by_text[3] != by_text[1]
    for score in by_text:
        assert_ids_score_as_alone(model, ids, score)


def test_the_models_own_answer_is_greedy_and_another_is_not(loaded):
    model, tokenizer = loaded
    prompt = phi3_mlx.encode_prompt(tokenizer, "Tell me a story.")
    told = [chunk.token for chunk in phi3_mlx.stream_generate(model, tokenizer, "Tell me a story.", max_tokens=12)]
    own, other = phi3_mlx.score(model, tokenizer, prompt, [told, [*told[:-1], told[-1] + 1]])
    assert own.is_greedy
    assert not other.is_greedy
    assert own.tokens == told
    logprobs = [c.logprob for c in phi3_mlx.stream_generate(model, tokenizer, prompt, max_tokens=12)]
    assert own.logprobs == pytest.approx(logprobs, abs=SAME)


def test_a_raw_text_and_its_continuation_are_encoded_as_one(loaded):
    model, tokenizer = loaded
    for prompt, answer in (("The dog was", " happy"), ("The dog was ", "happy"), ("The dog was ha", "ppy and")):
        (score,) = phi3_mlx.score(model, tokenizer, prompt, [answer], raw=True)
        whole = phi3_mlx.encode_prompt(tokenizer, prompt + answer, raw=True)
        assert whole[-len(score.tokens) :] == score.tokens
        before = whole[: -len(score.tokens)]
        assert phi3_mlx.encode_prompt(tokenizer, prompt, raw=True)[: len(before)] == before
        assert_ids_score_as_alone(model, before, score)
    # The space counts with the word that it is one token with, and what was begun is taken back.
    space, none = (
        phi3_mlx.score(model, tokenizer, *pair, raw=True)[0]
        for pair in (("The dog was ", ["happy"]), ("The dog was", [" happy"]))
    )
    assert space == none


def test_continuations_that_begin_at_different_places_of_the_prompt_are_scored_together(loaded):
    model, tokenizer = loaded
    answers = ["happy", "\nhappy", " x", "happy and very sad"]
    together = phi3_mlx.score(model, tokenizer, "The dog was ", answers, raw=True)
    assert len({len(score.tokens) for score in together}) > 1
    for answer, score in zip(answers, together, strict=True):
        (by_itself,) = phi3_mlx.score(model, tokenizer, "The dog was ", [answer], raw=True)
        assert by_itself.tokens == score.tokens
        assert by_itself.logprobs == pytest.approx(score.logprobs, abs=SAME)


def test_what_is_scored_behind_a_chat_is_what_training_takes_for_the_answer(tmp_path):
    folders = {
        "sentencepiece": tokenizer_samples.TINY,
        "byte-level": tokenizer_samples.byte_level(
            tmp_path / "bytes", tokenizer_samples.PHI4_MINI_TOKENS, strip=False, eos_token="<|endoftext|>"
        ),
    }
    for folder in folders.values():
        tokenizer = read_tokenizer(folder)
        for answer in ("Yes.", "two\nlines", "a <|end|> in it", "naïve 日本"):
            messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
            ids, turns = render_training_chat(tokenizer, messages)
            trained = [token for token, turn in zip(ids, turns, strict=True) if turn]
            prompt = render_chat(tokenizer, messages[:1])
            answer_ids = encode_after(tokenizer, prompt, answer)
            assert trained[: len(answer_ids)] == answer_ids
            assert len(trained) - len(answer_ids) <= 1  # the token that ends the turn


def test_bos_stands_in_front_once_and_alone_where_the_prompt_is_empty(loaded):
    model, tokenizer = loaded
    bos = tokenizer.bos_token_id
    for prompt in ("", []):
        (score,) = phi3_mlx.score(model, tokenizer, prompt, ["Once upon a time"])
        assert score.tokens == tokenizer.encode("Once upon a time")
        assert_ids_score_as_alone(model, [bos], score)
    (with_bos,) = phi3_mlx.score(model, tokenizer, "<s>Once upon", [" a time"], raw=True)
    before = phi3_mlx.encode_prompt(tokenizer, "<s>Once upon", raw=True)
    assert before.count(bos) == 1
    assert_ids_score_as_alone(model, before, with_bos)


def test_an_empty_prompt_needs_a_bos_token(loaded, tmp_path):
    model, _ = loaded
    tokenizer = read_tokenizer(ROOT / "weights" / "tiny")
    tokenizer.bos_token_id = None
    with pytest.raises(PromptError, match="BOS"):
        phi3_mlx.score(model, tokenizer, "", ["Once"])
    assert phi3_mlx.score(model, tokenizer, [5], ["Once"])


def test_bos_stands_before_a_first_token_that_holds_the_whole_prompt(loaded):
    model, _ = loaded
    tokenizer = read_tokenizer(ROOT / "weights" / "tiny")
    tokenizer.add_bos_token = False
    (score,) = phi3_mlx.score(model, tokenizer, "d", ["og"], raw=True)
    assert score.tokens == tokenizer.encode("dog")
    assert tokenizer.encode("d")[0] != score.tokens[0]
    assert_ids_score_as_alone(model, [tokenizer.bos_token_id], score)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_continuation_is_refused_with_its_index(loaded, empty, raw):
    with pytest.raises(PromptError, match="continuation 1 is empty"):
        phi3_mlx.score(*loaded, "Hi", ["a", empty, "b"], raw=raw)


def test_a_continuation_may_fill_the_context_and_not_more(loaded):
    _, tokenizer = loaded
    model = oracle.make_ours(
        {**slim(CONFIGS["mini-4k"]), "max_position_embeddings": 64, "original_max_position_embeddings": 64}
    )
    (score,) = phi3_mlx.score(model, tokenizer, ids_of(model, 60, 0), [[5, 6, 7, 8]])
    assert_ids_score_as_alone(model, ids_of(model, 60, 0), score)
    with pytest.raises(PromptError, match="context is 64"):
        phi3_mlx.score(model, tokenizer, ids_of(model, 60, 0), [[5, 6, 7, 8, 9]])


def test_faults_are_told_before_anything_is_computed(loaded, read_tokens):
    model, tokenizer = loaded
    for continuations_, error in (
        (["a", 5], OptionError),
        (["a", [5, 10**6]], PromptError),
        (["a", ["b"]], OptionError),
        ("a", OptionError),
        (None, OptionError),
    ):
        with pytest.raises(error):
            phi3_mlx.batch_score(model, tokenizer, [("Hi", ["b"]), ("Hi", continuations_)])
    with pytest.raises(PromptError, match="list of"):
        phi3_mlx.batch_score(model, tokenizer, ["Hi"])
    assert read_tokens() == 0


def test_several_prompts_score_as_each_alone_and_progress_counts_them(loaded):
    model, tokenizer = loaded
    pairs = [(f"Tell me a story about {n} dogs.", [f"{n} dogs", "A dog", "No"][: n % 4]) for n in range(20)]
    told = []
    together = phi3_mlx.batch_score(model, tokenizer, pairs, progress=lambda *counts: told.append(counts))
    assert told == [(n, 20) for n in range(1, 21)]
    assert phi3_mlx.batch_score(model, tokenizer, []) == []
    for (prompt, answers), ours in zip(pairs, together, strict=True):
        by_itself = phi3_mlx.score(model, tokenizer, prompt, answers)
        assert [score.tokens for score in ours] == [score.tokens for score in by_itself]
        for one, other in zip(ours, by_itself, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=SAME)


@pytest.mark.parametrize("count", [7, 8, 9, 16, 17])
def test_prompts_that_end_in_one_step_make_room_for_the_rest(count):
    """Nothing else runs then, and those that wait must not be forgotten."""
    model = MODELS["3.5-mini"]
    prompts = [[Continued((*ids_of(model, 5, seed), 7), 5)] for seed in range(count)]
    scored = score_together(model, prompts)
    assert len(scored) == count
    for continued, each in zip(prompts, scored, strict=True):
        assert_as_alone(model, continued, each)
