"""Mixes of everything at once against the plainest oracle: the model without a cache, read anew for every answer.

What `test_traffic` compares with the job alone is compared here with numbers in which the engine has no part: forced
and scored tokens, alternatives, drafts, caches that jobs bring, stored prefixes on disk, and rows that pause.
"""

import math
import random

import mlx.core as mx
import numpy as np
import oracle
import pytest
from oracle import CONFIGS, ORIGINAL, slim
from rails import Rails
from test_traffic import SAMPLINGS, Alternate

from phi3_mlx.engine import fitting, prefix_files, prefixes, scheduler
from phi3_mlx.engine.draft_model import ModelDrafter
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.prefixes import PrefixStore
from phi3_mlx.engine.processors import Bias, Constraint, processed
from phi3_mlx.engine.sampler import Sampler, draw
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.models import slots
from phi3_mlx.models.cache import KVCache

NAMES = ("3.5-mini", "mini-4k", "long-and-window", "phi-4-mini")
MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in NAMES}
DRAFTS = {name: oracle.make_ours(slim(CONFIGS[name]), 1) for name in NAMES}
STOPS = frozenset({40, 41, 44})
CHOICES = [[7, 8, 9], [7, 8, 10], [11], [12, 13, 14, 15, 16]]
NEAR = 2e-4
PROCESSORS = [
    lambda: (),
    lambda: (Bias({3: 2.0, 5: -1.5}),),
    lambda: (Alternate(),),
    lambda: (Constraint(Rails(5)),),
    lambda: (Constraint(Rails(4, stop=44)), Bias({8: 3.0})),
]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Short prompts and answers meet what else long ones do, and whoever may draft does."""
    monkeypatch.setattr(KVCache, "step", 16)
    monkeypatch.setattr(slots, "LIKE", 32)
    monkeypatch.setattr(slots, "SETTLED", 2)
    monkeypatch.setattr(prefixes, "LEAST", 4)
    monkeypatch.setattr(scheduler, "LEAST", 4)
    monkeypatch.setattr(prefix_files, "_READ_AT_LEAST", 8)
    for module in (scheduler, fitting):
        monkeypatch.setattr(module, "ANSWER_BLOCK", 12)
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: min(most, self.most))
    monkeypatch.setattr(ModelDrafter, "length", lambda self, most: min(most, 3))


def ids_of(length, seed):
    return np.random.default_rng(seed).integers(2, 90, 200)[:length].tolist()


def drawn_job(rng, name):
    model = MODELS[name]
    length = rng.choice([rng.randint(1, 12), rng.randint(ORIGINAL - 14, ORIGINAL + 4), rng.randint(13, 90)])
    prompt = ids_of(length, rng.randrange(3))
    if rng.random() < 0.3:
        prompt = (prompt[:6] * 20)[:length]  # what lookup finds
    top = rng.choice([0, 0, 1, 3])
    if rng.random() < 0.15:
        return Job(prompt, 0, scored_from=rng.randint(1, length), candidates=[3, 9, 40], top=top)
    cache = None
    if rng.random() < 0.25:
        cache = model.make_cache()
        mx.eval(model(mx.array([prompt[: rng.randint(1, length)] + ids_of(9, 9)]), cache))
    options = {"stop_ids": STOPS, "top": top, "lookup": rng.choice([0, 0, 4]), "cache": cache}
    options["draft"] = rng.choice([None, None, None, DRAFTS[name]])
    if rng.random() < 0.15:
        return Job(prompt, rng.choice([2, 9]), choices=CHOICES, **options)
    sampling, processors = rng.choice(SAMPLINGS), rng.choice(PROCESSORS)()
    return Job(prompt, rng.choice([None, rng.randint(1, 24)]), sampling, processors=processors, **options)


def logprobs(logits):
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def steps_of(model, job, answer):
    """Logits (answer, vocab_size) of the places of an answer, each read in the regime of the text before it."""
    ids, boundary = [*job.prompt, *answer], model.config.original_max_position_embeddings
    logits = model(mx.array([ids]))[0]
    if model.config.longrope is not None and len(ids) > boundary:
        logits = mx.concatenate([model(mx.array([ids[:boundary]]))[0], logits[boundary:]])
    return logits[len(job.prompt) - 1 : -1].astype(mx.float32)


def check_scores(model, job, row):
    expected = logprobs(model(mx.array([job.prompt]))[0])
    targets = [(place - 1, job.prompt[place]) for place in range(job.scored_from, len(job.prompt))]
    targets += [(len(job.prompt) - 1, token) for token in job.candidates]
    assert [each.logprob for each in row.scores] == pytest.approx([expected[at].item() for at in targets], abs=NEAR)
    for (place, _), score in zip(targets, row.scores, strict=True):
        best = mx.sort(-expected[place])[: job.top]
        assert [-logprob for _, logprob in score.top] == pytest.approx(best.tolist(), abs=NEAR)


def check_choice(model, job, answer):
    """An answer is a choice, or its beginning, that is as likely as any."""
    totals = []
    for ids in job.choices:
        of_all = logprobs(model(mx.array([[*job.prompt, *ids]]))[0])
        totals.append(sum(of_all[len(job.prompt) - 1 + i, token].item() for i, token in enumerate(ids)))
    best = [ids for ids, total in zip(job.choices, totals, strict=True) if total > max(totals) - 10 * NEAR]
    said = answer[:-1] if answer and answer[-1] in STOPS else answer
    assert any(said == ids if len(said) < len(answer) else said == ids[: len(said)] for ids in best)


def check_answer(model, job, tokens):
    answer = [token.id for token in tokens]
    if not answer:
        return
    logits = steps_of(model, job, answer)
    expected, sampler = logprobs(logits), Sampler(job.sampling, job.prompt, model.config.vocab_size)
    for place, token in enumerate(tokens):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=NEAR)
        best = mx.sort(-expected[place])[: job.top].tolist()
        assert [-logprob for _, logprob in token.top] == pytest.approx(best, abs=NEAR)
        assert [expected[place, i].item() for i, _ in token.top] == pytest.approx([-each for each in best], abs=NEAR)
        assert (token.finish_reason == "stop") == (token.id in STOPS)
        assert token.finish_reason is None or place == len(tokens) - 1
        if not job.choices:
            scores = processed(job.processors, answer[:place], logits[place])
            nudged = scores.at[mx.array([token.id])].add(NEAR)  # as good as a tie
            drawn, state = [], sampler.state
            for each in (scores, nudged):
                sampler.state = state
                drawn.append(draw([sampler], logits[place][None], each[None]).ids.item())
            assert token.id in drawn
            sampler.state = state
            sampler.skip([token.id])
    if job.choices:
        check_choice(model, job, answer)


@pytest.mark.parametrize("seed", range(24))
def test_everything_at_once_is_what_the_model_says_without_a_cache(seed, tmp_path):
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    model, jobs = MODELS[name], [drawn_job(rng, name) for _ in range(rng.randint(2, 9))]
    joins = sorted(rng.randint(0, 14) for _ in jobs)
    cancels = [rng.randint(0, 30) if job.max_tokens is None or rng.random() < 0.2 else math.inf for job in jobs]
    chunk, needs = rng.choice([5, 16, 64]), []
    for job in jobs:
        measure = Scheduler(model, room=math.inf, chunk=chunk)
        measure.submit(job)
        measure.admit()
        needs.append(measure._plan.total - measure._plan.weights)
        for row in measure._batch.rows:
            row.finish()
    room = rng.choice([math.inf, *(max(needs) * rng.uniform(1, 1.6) for _ in range(2))])
    small = PrefixStore(100_000, directory=tmp_path, disk="1MB")
    store = rng.choice([None, small, small, PrefixStore("100MB")])
    runs, rows, said, count = Scheduler(model, room=room, chunk=chunk, prefixes=store), [], [[] for _ in jobs], 0
    while runs.busy or len(rows) < len(jobs):
        while len(rows) < len(jobs) and joins[len(rows)] <= count:
            rows.append(runs.submit(jobs[len(rows)]))
        step, count = runs.step(), count + 1
        assert not step.failed, step.failed[0].error
        for token in step.tokens:
            if len(said[token.row]) < cancels[token.row]:
                said[token.row].append(token)
        for row in rows:
            if len(said[row.index]) >= cancels[row.index]:
                row.finish()
    runs.end()
    for job, row, tokens in zip(jobs, rows, said, strict=True):
        if job.scored_from is not None:
            if not row.cancelled:
                check_scores(model, job, row)
            continue
        check_answer(model, job, tokens)
        assert row.cancelled or (tokens and tokens[-1].finish_reason)
    assert store is None or store.error is None
