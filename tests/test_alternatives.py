"""The likeliest tokens of each place: those of a log-softmax over all, whatever else runs and however they are read."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
from oracle import CONFIGS, slim

from phi3_mlx.engine import scores
from phi3_mlx.engine.alternatives import Likeliest
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.processors import Bias
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import OptionError

MODEL = oracle.make_ours(slim(CONFIGS["3.5-mini"]))


class Even:
    """Lets even ids follow alone, and must know the answer."""

    reads_answer = True

    def __call__(self, answer, logits):
        return mx.where(mx.arange(logits.shape[-1]) % 2 == 0, logits, -math.inf)


def likeliest(ids, count):
    """Of the token behind `ids`: (id, log-probability) of the `count` likeliest, in float64."""
    logits = np.array(MODEL(mx.array([ids]))[0, -1], dtype=np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return [(int(token), logprobs[token]) for token in np.argsort(-logprobs)[:count]]


def check(told, ids, count):
    expected = likeliest(ids, count)
    assert [token for token, _ in told] == [token for token, _ in expected]
    assert [logprob for _, logprob in told] == pytest.approx([logprob for _, logprob in expected], abs=1e-4)


def answers(jobs, **options):
    runs = Scheduler(MODEL, room=math.inf, **options)
    rows = [runs.submit(job) for job in jobs]
    said = [[] for _ in jobs]
    while runs.busy:
        step = runs.step()
        assert not step.failed
        for token in step.tokens:
            said[token.row].append(token)
    return said, rows


@pytest.mark.parametrize("lookup", [0, 6])
def test_each_token_is_told_with_the_likeliest_in_its_place(monkeypatch, lookup):
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)
    prompt = [5, 6, 7, 8] * 4
    (said,), _ = answers([Job(prompt, 24, top=3, lookup=lookup)])
    for place, token in enumerate(said):
        check(token.top, [*prompt, *(token.id for token in said[:place])], 3)
        assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=1e-6))


def test_in_a_batch_each_row_is_told_as_many_as_it_asks_for():
    jobs = [
        Job([5, 6, 7], 8, top=2),
        Job([9, 8], 8),
        Job([4, 4, 9, 11], 8, Sampling(1.3, seed=1), top=5),
        Job([3, 12], 8, top=4, processors=[Even()]),
        Job([3, 13], 8, top=1, processors=[Bias({7: 3.0})]),
    ]
    said, _ = answers(jobs)
    plain, _ = answers([dataclasses.replace(job, top=0) for job in jobs])
    for job, tokens, others in zip(jobs, said, plain, strict=True):
        assert [token.id for token in tokens] == [token.id for token in others]
        assert {token.top for token in others} == {()}
        for place, token in enumerate(tokens):
            check(token.top, [*job.prompt, *(token.id for token in tokens[:place])], job.top)


@pytest.mark.parametrize("chunk", [5, 64])
def test_scores_of_a_prompt_have_them_too(monkeypatch, chunk):
    monkeypatch.setattr(scores, "positions_at_once", lambda vocab_size: 9)
    prompts = [[2 + (i * i + n) % 90 for i in range(30 + n)] for n in range(3)]
    jobs = [Job(prompt, 0, scored_from=1, top=top) for prompt, top in zip(prompts, (4, 0, 2), strict=True)]
    _, rows = answers(jobs, chunk=chunk)
    for job, row in zip(jobs, rows, strict=True):
        assert len(row.scores) == len(job.prompt) - 1
        for place, score in enumerate(row.scores, 1):
            check(score.top, job.prompt[:place], job.top)


def test_there_are_no_more_than_the_vocabulary_has():
    logits = mx.array([[1.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
    told = Likeliest(logits, mx.logsumexp(logits, axis=-1), [9, 0]).told()
    assert [token for token, _ in told[0]] == [1, 2, 0]
    assert told[1] == ()


def test_where_none_are_wanted_nothing_is_computed():
    assert Likeliest(mx.zeros((2, 3)), mx.zeros((2,)), [0, 0]).arrays == []


def test_a_count_below_none_is_refused():
    with pytest.raises(OptionError, match="top -1"):
        Job([5], top=-1)
