"""A draft model changes how many steps a run takes, and nothing else."""

import copy
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import moe_models
import numpy as np
import oracle
import pytest
import small_models
from conftest import long_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from oracle import CONFIGS, ORIGINAL, slim
from peaks import fair_peak

import phi3_mlx
from phi3_mlx import cli
from phi3_mlx.engine import draft_model, drafts
from phi3_mlx.engine.draft_model import ModelDrafter
from phi3_mlx.engine.fitting import workload_of
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.payoff import StepTimes
from phi3_mlx.engine.plan import Workload, check_fits, plan_together
from phi3_mlx.engine.processors import Bias
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import CacheError, MemoryLimitError, OptionError
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.decoder import Decoder
from phi3_mlx.store import hub
from phi3_mlx.text.added_tokens import AddedToken
from phi3_mlx.text.alike import first_difference
from phi3_mlx.text.tokenizer import Tokenizer

SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.1),
    Sampling(0.7, top_p=0.9, repetition_penalty=1.05, seed=3),
]
IDS = ["greedy", "penalty", "draws"]
PHRASE = [11, 52, 93, 14, 75, 36, 87]


def model_of(name, seed=0, **changes):
    return oracle.make_ours({**slim(CONFIGS[name]), **changes}, seed)


MODELS = {name: model_of(name) for name in ("mini-4k", "3.5-mini", "long-and-window", "phi-4-mini")}
MODELS["phi3-small"] = small_models.make({**small_models.RAW, **small_models.LONG})
MODELS["moe"] = moe_models.make_ours(moe_models.CONFIGS["gain by regime"])
STRANGER = model_of("mini-4k", seed=5, vocab_size=256)


def near(model, noise=0.02):
    """The model with some noise in its weights, so that some of its guesses hold."""
    random = np.random.default_rng(1)
    other = type(model)(model.config)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array, dtype=np.float32)
        weights.append((name, mx.array(values * (1 + noise * random.standard_normal(values.shape).astype(np.float32)))))
    other.load_weights(weights)
    return other


NEAR = {name: near(model) for name, model in MODELS.items()}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Draft whatever the clock says, so that tests do not depend on the machine: a plain step seems to take long."""
    monkeypatch.setattr(drafts, "StepTimes", lambda: StepTimes(1e9, 0.0))
    monkeypatch.setattr(StepTimes, "saw_plain", lambda self, seconds: None)


def run(model, prompt, max_tokens=40, sampling=None, **options):
    generation = Generation(
        model, [prompt], max_tokens=max_tokens, sampling=sampling or Sampling(), room=math.inf, **options
    )
    return [(token.id, token.finish_reason) for token in generation], generation


@pytest.mark.parametrize("length", [20, ORIGINAL - 9, ORIGINAL + 5])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_the_tokens_are_those_of_plain_decoding(name, length, sampling, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    model, prompt = MODELS[name], (PHRASE * 20)[:length]
    plain, _ = run(model, prompt, sampling=sampling)
    drafted, generation = run(model, prompt, sampling=sampling, draft=NEAR[name])
    assert drafted == plain
    statistics = generation.statistics
    assert statistics.drafted_tokens >= statistics.accepted_tokens > 5
    assert statistics.decode_steps + statistics.accepted_tokens == 39
    read = [*prompt, *(token for token, _ in drafted)][: generation.draft_cache[0].offset]
    assert generation.draft_cache[0].sequence.ids[0, : len(read)].tolist() == read  # wrong guesses were trimmed


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("name", MODELS)
def test_another_member_of_the_family_may_draft_however_wrong_it_is(name, sampling):
    plain, _ = run(MODELS[name], PHRASE * 4, sampling=sampling)
    drafted, generation = run(MODELS[name], PHRASE * 4, sampling=sampling, draft=STRANGER)
    assert drafted == plain
    assert generation.statistics.drafted_tokens > generation.statistics.accepted_tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_a_draft_model_that_is_always_right_saves_all_it_can(sampling):
    model = MODELS["mini-4k"]
    plain, _ = run(model, PHRASE * 3, 52, sampling=sampling)
    drafted, generation = run(model, PHRASE * 3, 52, sampling=sampling, draft=near(model, 0))
    assert drafted == plain
    statistics = generation.statistics
    assert statistics.accepted_tokens == statistics.drafted_tokens == 47
    assert statistics.decode_steps == 4  # of 5 tokens, as long as nothing was timed, then of 17


def test_a_draft_model_that_is_always_wrong_costs_no_token():
    model, wrong = MODELS["mini-4k"], near(MODELS["mini-4k"], 0)
    wrong.lm_head.weight = -wrong.lm_head.weight
    plain, _ = run(model, PHRASE * 3)
    drafted, generation = run(model, PHRASE * 3, draft=wrong)
    assert drafted == plain
    assert generation.statistics.accepted_tokens == 0
    assert generation.statistics.drafted_tokens >= 38


class Alternate:
    """Excludes every other id, by the parity of the last token, and cannot go on behind one that it excludes."""

    reads_answer = True

    def __call__(self, answer, logits):
        assert all(token % 2 != before % 2 for before, token in pairwise(answer))
        ids = mx.arange(logits.shape[-1])
        return mx.where(ids % 2 == (answer[-1] % 2 if answer else 0), -math.inf, logits)


def scheduled(model, *jobs, room=math.inf, chunk=None):
    """The tokens of jobs that join one after the other, and the steps."""
    scheduler, said, steps = Scheduler(model, room=room, chunk=chunk), {}, []
    for job in jobs:
        said[scheduler.submit(job)] = []
        scheduler.step()
    rows = list(said)
    while scheduler.busy:
        steps.append(scheduler.step())
    for row in rows:
        if row.error is not None:
            raise row.error
    return [list(row.answer) for row in rows], steps


@pytest.mark.parametrize("processors", [(Alternate(),), (Bias({3: 2.0, 5: -1.5}),), (Alternate(), Bias({8: 1.0}))])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("lookup", [0, 8])
def test_processors_change_guesses_as_they_change_tokens(processors, sampling, lookup):
    model = MODELS["3.5-mini"]
    job = Job(PHRASE * 4, 30, sampling, processors=processors)
    plain, _ = scheduled(model, job)
    drafted, steps = scheduled(model, dataclasses.replace(job, draft=NEAR["3.5-mini"], lookup=lookup))
    assert drafted == plain
    assert sum(step.drafted for step in steps) > 5


def test_a_processor_that_fails_ends_its_job_alone():
    class Fails:
        reads_answer = True

        def __call__(self, answer, logits):
            if len(answer) > 8:
                raise RuntimeError("cannot go on")
            return logits

    model = MODELS["3.5-mini"]
    scheduler = Scheduler(model, room=math.inf)
    bad = scheduler.submit(Job(PHRASE * 4, 30, draft=NEAR["3.5-mini"], processors=(Fails(),)))
    while bad.error is None:
        scheduler.step()
    assert str(bad.error) == "cannot go on"
    good = scheduler.submit(Job(PHRASE * 4, 9, draft=NEAR["3.5-mini"]))
    while scheduler.busy:
        scheduler.step()
    assert [*good.answer] == [token for token, _ in run(model, PHRASE * 4, 9)[0]]


@pytest.mark.parametrize("length", range(1, 21, 3))
def test_stop_ids_and_the_budgets_end_fall_inside_drafts(length):
    model = MODELS["mini-4k"]
    plain, _ = run(model, PHRASE * 6, 30)
    options = {"draft": near(model, 0)}
    assert run(model, PHRASE * 6, length, **options)[0] == run(model, PHRASE * 6, length)[0]
    stop = {plain[length][0]}
    drafted, generation = run(model, PHRASE * 6, 30, stop_ids=stop, **options)
    assert drafted == run(model, PHRASE * 6, 30, stop_ids=stop)[0]
    assert drafted[-1][1] == "stop"
    assert generation.statistics.generated_tokens == len(drafted)


@pytest.mark.parametrize("chunk", [5, 16, None])
@pytest.mark.parametrize("bits", [None, KVBits(4, 4), KVBits(8, 4, 64)], ids=str)
def test_prompts_are_read_in_chunks_and_caches_packed_as_the_rows(chunk, bits, monkeypatch):
    model = model_of("phi-4")  # heads of 128 numbers
    draft = MODELS["3.5-mini"]  # of 96, which groups of 64 do not divide
    lengths = []
    call = Decoder.__call__

    def counting(self, ids, cache=None):
        if self is draft.model:
            lengths.append(ids.shape[1])
        return call(self, ids, cache)

    prompt = [2 + i * i % 90 for i in range(40)]
    plain, _ = run(model, prompt, kv_bits=bits)
    monkeypatch.setattr(Decoder, "__call__", counting)
    drafted, generation = run(model, prompt, kv_bits=bits, draft=draft, prefill_chunk=chunk)
    assert drafted == plain
    assert generation.statistics.drafted_tokens > 10
    assert generation.draft_cache[0].bits == (None if bits is None else KVBits(bits.keys, bits.values))
    assert max(lengths) <= (chunk or 40)


def test_no_guess_reads_over_a_boundary_of_either_model(monkeypatch):
    """Were one to, caches would be recomputed with each draft that is taken back."""
    model, draft = MODELS["3.5-mini"], model_of("phi-4-mini", original_max_position_embeddings=ORIGINAL + 11)
    reads = []
    call = Decoder.__call__

    def counting(self, ids, cache=None):
        reads.append((self, cache[0].offset + ids.shape[1]))
        return call(self, ids, cache)

    prompt = (PHRASE * 20)[: ORIGINAL - 12]
    plain, _ = run(model, prompt)
    monkeypatch.setattr(Decoder, "__call__", counting)
    drafted, generation = run(model, prompt, draft=draft)
    assert drafted == plain
    assert generation.statistics.drafted_tokens > 10
    for decoder, boundary in ((model.model, ORIGINAL), (draft.model, ORIGINAL + 11)):
        totals = [total for read_by, total in reads if read_by is decoder]
        over = [total > boundary for total in totals]
        assert True in over
        assert over == sorted(over)  # once over it, no read is back on this side


def test_trims_of_guesses_never_cost_a_window(monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    work = []
    monkeypatch.setattr(KVCache, "forget", lambda self: work.append(self))
    _, generation = run(MODELS["mini-4k"], PHRASE * 12, 60, draft=STRANGER)
    assert generation.statistics.drafted_tokens - generation.statistics.accepted_tokens > 100
    assert not work


@pytest.mark.parametrize("prompt", [20, 31, 32, 50])
def test_beyond_its_own_context_a_draft_model_drafts_no_more_and_the_run_goes_on(prompt):
    model, draft = (
        MODELS["mini-4k"],
        model_of("mini-4k", seed=5, max_position_embeddings=32, original_max_position_embeddings=32),
    )
    ids = (PHRASE * 20)[:prompt]
    plain, _ = run(model, ids)
    drafted, generation = run(model, ids, draft=draft)
    assert drafted == plain
    assert generation.draft_cache[0].offset <= 32
    assert (generation.statistics.drafted_tokens > 0) == (prompt <= 31)


@pytest.mark.parametrize("vocab_size", long_after(1, [64, 96, 128]))
def test_padding_rows_may_differ_and_an_id_that_it_does_not_know_ends_the_drafts(vocab_size):
    model, draft = MODELS["mini-4k"], model_of("mini-4k", seed=5, vocab_size=vocab_size)
    for sampling in SAMPLINGS:
        for prompt in (PHRASE * 3, [11, 52, 14] * 3):
            plain, _ = run(model, prompt, sampling=sampling)
            drafted, generation = run(model, prompt, sampling=sampling, draft=draft)
            assert drafted == plain
            if max(prompt) >= vocab_size:
                assert generation.statistics.drafted_tokens == 0
    assert generation.statistics.drafted_tokens or vocab_size == 64


# ------------------------------------------------------------------------------------------ which source


def test_the_source_that_pays_more_drafts(monkeypatch):
    """An answer that repeats itself is looked up, for nothing; what is new is the draft model's."""
    model = MODELS["mini-4k"]
    calls = []
    draft = ModelDrafter.draft
    monkeypatch.setattr(ModelDrafter, "draft", lambda self, length: calls.append(length) or draft(self, length))
    plain, _ = run(model, PHRASE * 4, 60)
    both, generation = run(model, PHRASE * 4, 60, lookup=16, draft=near(model))
    assert both == plain
    assert calls
    with_both = len(calls)
    calls.clear()
    assert run(model, PHRASE * 4, 60, draft=near(model))[0] == plain
    assert calls
    assert generation.statistics.drafted_tokens > sum(calls[:with_both]) / 2


def payoff(monkeypatch, plain=1.0, extra=0.0, guessing=0.1):
    monkeypatch.undo()
    drafter = ModelDrafter.__new__(ModelDrafter)
    super(ModelDrafter, drafter).__init__(16, StepTimes(plain, extra))
    drafter.guessing = guessing
    return drafter


def test_the_longest_draft_that_pays_follows_what_guesses_cost(monkeypatch):
    lengths = []
    for guessing in (0.01, 0.1, 0.3, 0.6, 1.0):
        drafter = payoff(monkeypatch, guessing=guessing)
        lengths.append(super(ModelDrafter, drafter).length(16))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 6
    assert lengths[2] > 0
    assert lengths[-1] == 0  # a guess that costs a step saves none
    assert drafter.rate(4) < 1 < payoff(monkeypatch).rate(4)


def test_no_guess_is_made_before_a_plain_step_was_timed(monkeypatch):
    monkeypatch.undo()
    times = StepTimes()
    monkeypatch.setattr(drafts, "StepTimes", lambda: times)
    seen = []
    draft = ModelDrafter.draft
    monkeypatch.setattr(ModelDrafter, "draft", lambda self, length: seen.append(times.plain) or draft(self, length))
    run(MODELS["mini-4k"], PHRASE * 4, draft=NEAR["mini-4k"])
    assert seen
    assert None not in seen


def test_a_draft_model_that_does_not_pay_is_asked_ever_more_seldom(monkeypatch):
    monkeypatch.undo()
    clock = [0.0]
    monkeypatch.setattr(draft_model, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    read = ModelDrafter._guesses

    def slow(self, ids, length):
        clock[0] += 0.9 * length  # nearly a plain step each
        return read(self, ids, length)

    monkeypatch.setattr(ModelDrafter, "_guesses", slow)
    monkeypatch.setattr(drafts, "StepTimes", lambda: StepTimes(1.0, 0.05))
    monkeypatch.setattr(StepTimes, "saw_plain", lambda self, seconds: None)
    plain, _ = run(MODELS["mini-4k"], PHRASE * 4, 80)
    drafted, generation = run(MODELS["mini-4k"], PHRASE * 4, 80, draft=STRANGER)
    assert drafted == plain
    assert 0 < generation.statistics.drafted_tokens < 12


# ------------------------------------------------------------------------------------------ several rows, caches


def test_only_a_row_that_is_alone_drafts():
    model, draft = MODELS["3.5-mini"], NEAR["3.5-mini"]
    jobs = [Job(PHRASE * 4, 40, draft=draft), Job(PHRASE * 9, 6, draft=draft), Job(PHRASE * 2, 20)]
    said, steps = scheduled(model, *jobs)
    assert sum(step.drafted for step in steps) > 5
    told = [{token.row for token in step.tokens} for step in steps]
    answering = {row: [at for at, rows in enumerate(told) if row in rows] for row in set().union(*told)}
    for at, step in enumerate(steps):
        if step.drafted:  # nobody waits for the pass that verifies it
            assert sum(places[0] <= at <= places[-1] for places in answering.values()) == 1
    for job, answer in zip(jobs, said, strict=True):
        assert answer == [token for token, _ in run(model, job.prompt, job.max_tokens)[0]]
    generation = Generation(
        model, [PHRASE * 4, PHRASE * 3], max_tokens=12, sampling=Sampling(), draft=draft, room=math.inf
    )
    list(generation)
    assert generation.statistics.drafted_tokens == 0
    assert generation.draft_cache == []


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 25), st.integers(0, 2), st.booleans()), min_size=1, max_size=4
    ),
    st.sampled_from(["3.5-mini", "mini-4k", "long-and-window"]),
    st.sampled_from([3, 16, None]),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jobs_that_come_and_go_give_what_they_give_alone(plots, name, chunk):
    model = MODELS[name]
    jobs = [
        Job((PHRASE * 20)[i : i + length], most, SAMPLINGS[sampling], draft=NEAR[name] if drafts else None, lookup=4)
        for i, (length, most, sampling, drafts) in enumerate(plots)
    ]
    said, _ = scheduled(model, *jobs, chunk=chunk)
    for job, answer in zip(jobs, said, strict=True):
        alone, _ = run(model, job.prompt, job.max_tokens, job.sampling)
        assert answer == [token for token, _ in alone]


def test_a_row_that_pauses_lets_go_of_the_draft_models_keys_and_values_too():
    model = MODELS["3.5-mini"]
    scheduler = Scheduler(model, room=math.inf)
    row = scheduler.submit(Job(PHRASE * 4, 40, draft=NEAR["3.5-mini"]))
    for _ in range(5):
        scheduler.step()
    assert row.draft_cache
    scheduler._batch.remove(row)
    row.pause()
    assert row.draft_cache == []
    scheduler._batch.add(row, 64)
    while scheduler.busy:
        scheduler.step()
    assert row.answer == [token for token, _ in run(model, PHRASE * 4, 40)[0]]


def test_a_cache_that_another_run_took_over_is_read_no_more():
    model, draft = MODELS["3.5-mini"], NEAR["3.5-mini"]
    first = Generation(model, [PHRASE * 4], max_tokens=40, sampling=Sampling(), draft=draft, room=math.inf)
    tokens = iter(first)
    for _ in range(4):
        next(tokens)
    second = Generation(
        model,
        [PHRASE * 4],
        max_tokens=30,
        sampling=Sampling(),
        draft=draft,
        cache=first.cache,
        draft_cache=first.draft_cache,
        room=math.inf,
    )
    before = second.draft_cache[0].offset
    assert before == 27
    with pytest.raises(CacheError):
        for _ in tokens:
            pass
    assert second.draft_cache[0].offset == before
    assert [token.id for token in second] == [token for token, _ in run(model, PHRASE * 4, 30)[0]]


def test_ctrl_c_while_a_model_drafts_leaves_caches_that_can_be_read_on(monkeypatch):
    model, draft = MODELS["3.5-mini"], NEAR["3.5-mini"]
    plain, _ = run(model, PHRASE * 4)
    for after in range(1, 30, 4):
        calls = [0]
        call = Decoder.__call__

        def interrupted(self, ids, cache=None, calls=calls, after=after, call=call):
            if self is draft.model:
                calls[0] += 1
                if calls[0] == after:
                    raise KeyboardInterrupt
            return call(self, ids, cache)

        generation = Generation(model, [PHRASE * 4], max_tokens=40, sampling=Sampling(), draft=draft, room=math.inf)
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, "__call__", interrupted)
            said = []
            with pytest.raises(KeyboardInterrupt):
                said.extend(token.id for token in generation)
        draft_cache = generation.draft_cache if generation.draft_cache[0].offset else None
        again, _ = run(model, PHRASE * 4, draft=draft, cache=generation.cache, draft_cache=draft_cache)
        assert again == plain


# ------------------------------------------------------------------------------------------ with text


@pytest.fixture(scope="module")
def tiny():
    return phi3_mlx.load("tiny")


@pytest.fixture(scope="module")
def other():
    """A model of another vocabulary."""
    model, tokenizer = phi3_mlx.load("tiny")
    tokenizer = copy.copy(tokenizer)
    tokenizer.id_to_token = lambda number: (
        "<unheard of>" if number == 300 else type(tokenizer).id_to_token(tokenizer, number)
    )
    return model, tokenizer


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4}, {"kv_bits": 4}], ids=str)
def test_the_text_is_the_same_with_a_draft_model(tiny, options):
    plain = list(phi3_mlx.stream_generate(*tiny, "Tell me a story.", max_tokens=40, **options))
    drafted = list(phi3_mlx.stream_generate(*tiny, "Tell me a story.", max_tokens=40, draft=tiny, **options))
    assert [chunk.text for chunk in drafted] == [chunk.text for chunk in plain]
    assert drafted[-1].drafted_tokens >= drafted[-1].accepted_tokens > 30 / 2
    text = phi3_mlx.generate(*tiny, "Tell me a story.", max_tokens=40, draft=tiny, **options)
    assert text == "".join(chunk.text for chunk in plain)


def test_a_later_turn_of_a_conversation_reads_only_its_own_tokens_with_the_draft_model_too(tiny, monkeypatch):
    model, tokenizer = tiny
    draft = phi3_mlx.load("tiny")
    reads = []
    call = Decoder.__call__

    def counting(self, ids, cache=None):
        if self is draft[0].model:
            reads.append(ids.shape[1])
        return call(self, ids, cache)

    monkeypatch.setattr(Decoder, "__call__", counting)
    plain, drafted = phi3_mlx.Conversation(model, tokenizer), phi3_mlx.Conversation(model, tokenizer)
    for turn in ("Tell me a long story about a cat.", "And then?", "Tell me more."):
        before = drafted.cached_tokens
        reads.clear()
        right = "".join(chunk.text for chunk in plain.send(turn, max_tokens=30))
        assert "".join(chunk.text for chunk in drafted.send(turn, max_tokens=30, draft=draft)) == right
        if before:
            assert max(reads) < 30 < before
    drafted.reset()
    assert drafted._cache.beside(draft[0]).ids == []


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("tiny", "draft is 'tiny'; give the model and its tokenizer: draft=load(NAME)"),
        (MODELS["mini-4k"], "draft is not all that load() gives; give the model and its tokenizer: draft=load(NAME)"),
    ],
    ids=["name", "model"],
)
def test_what_is_no_loaded_model_is_refused_in_a_line(tiny, draft, message):
    for call in (
        lambda: phi3_mlx.generate(*tiny, "Hi", draft=draft),
        lambda: phi3_mlx.stream_generate(*tiny, "Hi", draft=draft),
        lambda: phi3_mlx.Conversation(*tiny).send("Hi", draft=draft),
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert str(caught.value) == message


def test_another_vocabulary_is_refused_in_a_line_at_the_call(tiny, other):
    wrong = (
        r"^the draft model has another vocabulary than the model: token 300 is '<unheard of>' there and '.+' here; take"
    )
    with pytest.raises(OptionError, match=wrong):
        phi3_mlx.stream_generate(*tiny, "Hi", draft=other)
    conversation = phi3_mlx.Conversation(*tiny)
    with pytest.raises(OptionError, match=wrong):
        conversation.send("Hi", draft=other)
    assert conversation.messages == []


class Words(Tokenizer):
    """A vocabulary that is a list of words, and added tokens behind it."""

    def __init__(self, words, added=()):
        self.words = words
        super().__init__(len(words), [AddedToken(len(words) + i, content) for i, content in enumerate(added)])

    def token_to_id(self, token):
        raise NotImplementedError

    def id_to_token(self, token_id):
        return [*self.words, *self.added_tokens][token_id] if token_id < self.vocab_size else None

    _encode_text = _stream = token_bytes = drops_first_space = token_to_id


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [
        (Words("abc"), Words("abc"), None),
        (Words("abc"), Words("abd"), 2),
        (Words("abc"), Words("ab"), 2),  # a word of the text that one cannot write
        (Words("abc", ["<|end|>"]), Words("abc", ["<|end|>", "<|placeholder1|>"]), None),
        (Words("abc", ["<|end|>", "<|user|>"]), Words("abc", ["<|user|>", "<|end|>"]), 3),
        (Words("abc", ["<|end|>"]), Words("abc"), None),
        (Words("abc", ["d"]), Words("abcd"), None),
    ],
)
def test_each_id_of_both_vocabularies_must_mean_the_same(one, two, difference):
    assert first_difference(one, two) == first_difference(two, one) == difference
    assert first_difference(one, one) is None


# ------------------------------------------------------------------------------------------ memory


def test_the_plan_holds_both_models_and_caches():
    one, other = Workload.of_model(MODELS["3.5-mini"], 300), Workload.of_model(MODELS["mini-4k"], 300)
    both = dataclasses.replace(one, draft=other)
    apart, plan = (one.plan(0), other.plan(0)), both.plan(0)
    assert plan.weights == sum(each.weights for each in apart)
    assert plan.cache == sum(each.cache for each in apart)
    assert plan.workspace == max(each.workspace for each in apart)
    several = plan_together([both, both, one], 0)
    assert several.weights == plan.weights  # the same draft model counts once
    assert several.cache == 3 * one.cache_bytes() + 2 * other.cache_bytes()
    with pytest.raises(MemoryLimitError, match=r" with a draft model's .*: without the draft model it needs "):
        check_fits(both, plan.total - 1)
    short = dataclasses.replace(other, config=MODELS["phi3-small"].config)
    assert dataclasses.replace(one, length=600, draft=short).parts[1].length == 384  # its context


@pytest.mark.parametrize("length", long_after(1, [300, 1000]))
def test_the_peak_stays_within_the_plan(length, monkeypatch):
    raw = {**CONFIGS["medium-4k"], "sliding_window": None, "intermediate_size": 1024, "vocab_size": 2000}
    model = oracle.make_ours(raw)
    draft = oracle.make_ours({**raw, "num_hidden_layers": 2})
    mx.eval(model.parameters(), draft.parameters())
    prompt = [1 + i % 1900 for i in range(length)]
    job = Job(prompt, 40, draft=draft)
    workload = workload_of(dataclasses.replace(Workload.of_model(model, 0), chunk=128), Row(0, job, model))
    plan = workload.plan(0)

    def run():
        generation = Generation(
            model, [prompt], max_tokens=40, sampling=Sampling(), draft=draft, prefill_chunk=128, room=math.inf
        )
        list(generation)
        assert generation.statistics.drafted_tokens > 10
        assert plan.cache == sum(layer.nbytes for layer in (*generation.cache, *generation.draft_cache))

    peak = plan.weights + fair_peak(run, lambda peak: plan.weights + peak <= 1.02 * plan.total)
    assert 0.5 * plan.total < peak <= 1.02 * plan.total


def test_a_run_whose_draft_model_does_not_fit_is_refused_before_anything_is_read(tiny):
    model, _ = tiny
    needed = Workload.of_model(model, 200).plan(0)
    job = Job([5] * 100, 100, draft=model)
    room = needed.cache + needed.workspace + needed.cache // 2
    scheduler = Scheduler(model, room=room)
    with pytest.raises(MemoryLimitError, match="without the draft model it needs"):
        scheduler.submit(job)
    Scheduler(model, room=room + needed.cache).submit(job)
    Scheduler(model, room=room).submit(dataclasses.replace(job, draft=None))


# ------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """The bundled model with two words in each other's place."""
    directory = tmp_path_factory.mktemp("models") / "swapped"
    shutil.copytree(hub.resolve("tiny"), directory)
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    words = {number: word for word, number in vocabulary.items()}
    vocabulary[words[900]], vocabulary[words[901]] = 901, 900
    file.write_text(json.dumps(raw), encoding="utf-8")
    return directory


def typed(capsys, *words):
    try:
        code = cli.main([*map(str, words)])
    except SystemExit as exit:
        code = exit.code
    return code or 0, *capsys.readouterr()


def test_the_command_line_drafts_and_says_what_held(capsys):
    ask = ["generate", "-p", "Tell me a story.", "--max-tokens", 30, "--temperature", 1, "--seed", 2]
    code, plain, said = typed(capsys, *ask, "--lookup", 0, "--stats")
    assert code == 0
    assert "drafted" not in said
    code, drafted, said = typed(capsys, *ask, "--draft-model", "tiny", "--stats")
    assert (code, drafted) == (0, plain)
    assert re.search(r"tok/s, \d+ of \d+ drafted tokens held; peak memory", said)
    code, drafted, _ = typed(capsys, *ask, "--draft-model", "tiny", "--json")
    figures = json.loads(drafted)
    assert figures["drafted_tokens"] >= figures["accepted_tokens"] > 10
    assert figures["text"].strip() == plain.strip()


def test_a_chat_drafts_too(capsys, monkeypatch):
    lines = b"Tell me a story.\nAnd then?\n"
    answers = []
    for options in ([], ["--draft-model", "tiny"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        code, out, said = typed(capsys, "chat", "--max-tokens", 20, "--stats", *options)
        assert code == 0
        answers.append(out)
    assert answers[0] == answers[1]
    assert said.count("drafted tokens held") == 2


@pytest.mark.parametrize("command", [["generate", "-p", "Hi"], ["chat"]], ids=["generate", "chat"])
def test_faults_of_a_draft_model_are_one_line_before_anything_is_loaded(command, capsys, monkeypatch, swapped):
    loaded = []
    monkeypatch.setattr("phi3_mlx.store.checkpoint.read_model", lambda *_, **__: loaded.append(1))
    code, out, said = typed(capsys, *command, "--draft-model", swapped)
    assert (code, out) == (2, "")
    assert re.match(
        r"phi3-mlx: the draft model has another vocabulary than the model: token 900 is '.+' there and ", said
    )
    assert said.count("\n") == 1
    code, out, said = typed(capsys, *command, "--draft-model", "./nowhere")
    assert (code, out, said.count("\n")) == (1, "", 1)
    assert "nowhere" in said
    code, out, said = typed(capsys, *command, "--draft-model", "tiny", "--memory", "6MB")
    assert (code, out, said.count("\n")) == (1, "", 1)
    assert " with a draft model's " in said
    assert not loaded


def test_plan_shows_both_models(capsys):
    plan = ["plan", "-m", "phi-3-medium-4k-4bit", "--json"]
    alone = json.loads(typed(capsys, *plan)[1])
    both = json.loads(typed(capsys, *plan, "--draft-model", "phi-3-mini-4k-4bit")[1])
    mini = json.loads(typed(capsys, "plan", "-m", "phi-3-mini-4k-4bit", "--json")[1])
    assert both["weights"] == alone["weights"] + mini["weights"]
    for bits, needed in both["needs"].items():
        assert alone["needs"][bits] + mini["weights"] < needed < alone["needs"][bits] + mini["needs"][bits]
    assert both["machines"][1]["longest"]["16"] < alone["machines"][1]["longest"]["16"]
    total = phi3_mlx.memory_plan("phi-3-medium-4k-4bit", 4096, draft_model="phi-3-mini-4k-4bit").total
    assert total == both["needs"]["16"]
    longest = phi3_mlx.longest_context("phi-3-medium-4k-4bit", "16GB", draft_model="phi-3-mini-4k-4bit")
    assert longest == both["machines"][1]["longest"]["16"]
