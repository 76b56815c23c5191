"""Tokens that must follow are read together: fewer steps, and otherwise the answer that a mask at every step gives."""

import math
from dataclasses import replace

import mlx.core as mx
import moe_models
import numpy as np
import oracle
import pytest
import small_models
from oracle import CONFIGS, ORIGINAL, slim
from rails import Rails

from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.processors import Bias, Constraint
from phi3_mlx.engine.rows import FORCED
from phi3_mlx.engine.sampler import Sampler, draw
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import Phi3Error
from phi3_mlx.models.cache import KVBits

MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in ("mini-4k", "3.5-mini", "long-and-window")}
MODELS["phi3-small"] = small_models.make({**small_models.RAW, **small_models.LONG})
MODELS["moe"] = moe_models.make_ours(moe_models.CONFIGS["gain by regime"])
MODEL = MODELS["3.5-mini"]
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "counts": Sampling(presence_penalty=0.5, frequency_penalty=0.3),
    "sampled": Sampling(0.9, seed=3),
    "all": Sampling(0.8, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.1, seed=4),
}


def ids_of(length, seed=0):
    return [2 + (i * 7 + seed * 31 + i * i) % 88 for i in range(length)]


def naive(model, prompt, matcher, sampling, tokens):
    """Mask, draw, and read everything anew: (id, log-probability) each."""
    ids, sampler, told = [*prompt], Sampler(sampling, prompt, model.config.vocab_size), []
    for _ in range(tokens):
        logits = model(mx.array([ids]))[0, -1:].astype(mx.float32)
        known = np.full(logits.shape[-1], -np.inf, dtype=np.float32)
        allowed = matcher.allowed(ids[len(prompt) :])
        known[: len(allowed)][allowed == 1] = 0
        token, logprob, _ = draw([sampler], logits, logits + mx.array(known))
        ids.append(int(token.item()))
        told.append((ids[-1], float(logprob.item())))
    return told


def told_of(model, prompts, matcher, sampling, tokens, **options):
    """What the engine tells of each prompt, and its statistics."""
    run = Generation(
        model,
        prompts,
        max_tokens=tokens,
        sampling=sampling,
        processors=[[Constraint(matcher)]] * len(prompts),
        **options,
    )
    told = [[] for _ in prompts]
    for token in run:
        told[token.row].append((token.id, token.logprob))
    return told, run.statistics


def assert_same(ours, theirs, tolerance=2e-4):
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in theirs], abs=tolerance)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_answer_is_what_a_mask_at_every_step_gives(name, sampling):
    model, matcher = MODELS[name], Rails()
    for length in (5, ORIGINAL - 6):  # the second crosses a boundary of LongRoPE within a run
        prompt = ids_of(length)
        right = naive(model, prompt, matcher, sampling, 18)
        told, statistics = told_of(model, [prompt], matcher, sampling, 18)
        assert_same(told[0], right)
        assert statistics.decode_steps <= 11


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_rows_of_a_batch_read_what_must_follow_together(sampling):
    prompts, matcher = [ids_of(length, length) for length in (4, 9, 31)], Rails(6)
    told, statistics = told_of(MODEL, prompts, matcher, sampling, 24)
    for prompt, ours in zip(prompts, told, strict=True):
        assert_same(ours, told_of(MODEL, [prompt], MaskedOnly(matcher), sampling, 24)[0][0])
        assert_same(ours, naive(MODEL, prompt, matcher, sampling, 24))
    assert statistics.decode_steps <= 9


class MaskedOnly:
    """A matcher that does not say what must follow."""

    def __init__(self, matcher):
        self._matcher = matcher

    def allowed(self, answer):
        return self._matcher.allowed(answer)

    def forced(self, answer, most):
        return []


@pytest.mark.parametrize("most", range(1, 14))
def test_an_answer_may_end_anywhere_in_a_run(most):
    right = naive(MODEL, ids_of(7), Rails(5), Sampling(), most)
    told, _ = told_of(MODEL, [ids_of(7)], Rails(5), Sampling(), most)
    assert_same(told[0], right)
    both, _ = told_of(MODEL, [ids_of(7), ids_of(9)], Rails(5), Sampling(), most)
    assert_same(both[0], right)
    assert len(both[1]) == most


def test_a_long_run_is_read_in_parts():
    told, statistics = told_of(MODEL, [ids_of(5)], Rails(60), Sampling(), 60)
    assert_same(told[0], naive(MODEL, ids_of(5), Rails(60), Sampling(), 60))
    assert 60 / (FORCED + 1) <= statistics.decode_steps <= 60 / FORCED + 3


@pytest.mark.parametrize("bits", [None, KVBits(8, 8)], ids=["plain", "packed"])
@pytest.mark.parametrize("lookup", [0, 8])
def test_drafts_and_packed_caches_change_nothing(monkeypatch, bits, lookup):
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)
    prompt = [*range(8, 24), *range(8, 24)]
    options = {"kv_bits": bits, "lookup": lookup}
    for sampling in SAMPLINGS.values():
        right, _ = told_of(MODEL, [prompt], MaskedOnly(Rails(3)), sampling, 40, kv_bits=bits)
        told, statistics = told_of(MODEL, [prompt], Rails(3), sampling, 40, **options)
        assert_same(told[0], right[0], 2e-4 if bits is None else 2e-2)
        assert statistics.decode_steps < 34


def test_a_draft_model_changes_nothing():
    for sampling in SAMPLINGS.values():
        right = naive(MODEL, ids_of(8), Rails(3), sampling, 40)
        told, _ = told_of(MODEL, [ids_of(8)], Rails(3), sampling, 40, draft=MODEL)
        assert_same(told[0], right)


def test_nothing_is_forced_beside_a_processor_that_may_exclude_it():
    job = Job(ids_of(5), 20, Sampling(), processors=[Constraint(Rails()), Bias({1: -math.inf})])
    runs = Scheduler(MODEL)
    row = runs.submit(job)
    steps = []
    while runs.busy:
        steps.append(len(runs.step().tokens))
    assert max(steps) == 1
    assert isinstance(row.error, Phi3Error) or len(row.answer) == 20


def test_a_row_that_pauses_within_a_run_goes_on_as_if_it_had_not():
    job = Job(ids_of(6), 30, SAMPLINGS["all"], processors=[Constraint(Rails(7))])
    right = naive(MODEL, ids_of(6), Rails(7), SAMPLINGS["all"], 30)
    for after in range(1, 8):
        runs = Scheduler(MODEL)
        row, other = runs.submit(job), runs.submit(replace(job, prompt=ids_of(9)))
        told = []
        for _ in range(after):
            told += [token for token in runs.step().tokens if token.row == row.index]
        runs._batch.remove(row)
        row.pause()
        runs._batch.add(row, 16)
        while runs.busy:
            told += [token for token in runs.step().tokens if token.row == row.index]
        assert_same([(token.id, token.logprob) for token in told], right)
        assert [token.id for token in told] == row.answer
        assert len(other.answer) == 30


def test_a_stop_id_ends_the_answer_where_a_run_could_begin():
    matcher = Rails(4, stop=89)
    told, _ = told_of(MODEL, [ids_of(5)], matcher, Sampling(2.0, seed=1), 200, stop_ids={89})
    right = naive(MODEL, ids_of(5), matcher, Sampling(2.0, seed=1), len(told[0]))
    assert_same(told[0], right)
    assert told[0][-1][0] == 89
    assert len(told[0]) % 4 == 1


def test_nan_in_a_run_ends_the_row():
    row_of = Scheduler(MODEL)
    row = row_of.submit(Job(ids_of(5), 30, Sampling(), processors=[Constraint(Rails(9))]))
    row_of.step()
    for layer in row.cache:
        layer.state = [array * math.nan for array in layer.state]
    while row_of.busy:
        row_of.step()
    assert "NaN" in str(row.error)
    assert len(row.answer) < 30


def test_tokens_that_were_skipped_leave_the_sampler_as_if_they_were_drawn():
    for sampling in SAMPLINGS.values():
        drawn, skipped = (Sampler(replace(sampling, seed=1), [1, 2], 96) for _ in range(2))
        for token in (5, 9, 5):
            logits = mx.where(mx.arange(96) == token, 0.0, -math.inf)[None]
            assert draw([drawn], logits)[0].tolist() == [token]
        skipped.skip([5, 9, 5])
        for ours, theirs in zip(skipped.state, drawn.state, strict=True):
            assert (ours is None and theirs is None) or mx.array_equal(ours, theirs)
