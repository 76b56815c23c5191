"""Requests that come and go: threads that submit and cancel, memory that is short, and newcomers beside a stream."""

import dataclasses
import gc
import math
import random
import threading

import mlx.core as mx
import oracle
import pytest
from conftest import long_after
from test_traffic import FAILING, MODELS, PROCESSORS, SAMPLINGS, Plot, alone, excluded, ids_of, mixed

from phi3_mlx import memory_limit
from phi3_mlx.engine import fitting, scheduler
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.shared_cache import SharedKVCache


def drawn(rng, **options):
    plot = Plot(
        join=rng.randint(0, 20),
        cancel=rng.choice([None, rng.randint(0, 12)]),
        length=rng.randint(1, 60),
        seed=rng.randint(0, 2),
        max_tokens=rng.randint(1, 20),
        sampling=rng.randrange(4),
        processors=rng.randrange(len(PROCESSORS)),
        bits=rng.choice([None, 8]),
        lookup=rng.choice([0, 4]),
        scored=rng.choice(["", "", "prompt", "continuations"]),
    )
    return dataclasses.replace(plot, **options)


# ------------------------------------------------------------------------------------------ threads


def test_threads_submit_and_cancel_while_another_steps():
    model, runs = MODELS["3.5-mini"], Scheduler(MODELS["3.5-mini"], room=math.inf, chunk=16)
    given, errors = [], []

    def submit(seed):
        rng = random.Random(seed)
        try:
            for _ in range(6):
                plot = drawn(rng, cancel=None, bits=None, scored="", max_tokens=12)
                row, cancel = runs.submit(plot.job(model)), rng.random() < 0.5
                given.append((plot, row, cancel))
                while cancel and not row.finished:
                    if len(row.answer) >= 2:
                        row.finish()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or runs.busy:
        runs.step()
    assert not errors
    assert len(given) == 18
    for plot, row, cancel in given:
        expected = [token[0] for token in alone("3.5-mini", plot)]
        assert row.finished
        assert row.answer == (expected[: len(row.answer)] if cancel or row.error else expected)
        assert not row.error or plot.processors in FAILING


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", long_after(1, ["3.5-mini", "phi3-small", "moe"]))
def test_jobs_that_wait_and_pause_for_want_of_memory_give_what_they_give_alone(name, monkeypatch):
    for home in (fitting, scheduler):
        monkeypatch.setattr(home, "ANSWER_BLOCK", 16)
    monkeypatch.setattr(KVCache, "step", 16)
    model, rng, paused = MODELS[name], random.Random(name), 0
    for _ in range(4):
        mix = [
            drawn(rng, join=3 * i, cancel=rng.randint(40, 90), processors=rng.randrange(4), bits=None, scored="")
            for i in range(4)
        ]
        mix += [drawn(rng, cancel=None, bits=None, scored="prompt")]
        endless = [plot if plot.scored else dataclasses.replace(plot, max_tokens=None) for plot in mix]
        least = Scheduler(model, room=math.inf, chunk=16)
        least.submit(Job(ids_of(model, 60, 0), 110, lookup=4, sampling=SAMPLINGS[3]))
        least.admit()
        room = least._plan.total - least._plan.weights + least._plan.cache // 2
        said, failed, count = mixed(model, endless, 16, room=room)
        assert not failed
        paused += count
        for plot, tokens in zip(mix, said, strict=True):
            limited = plot if plot.scored else dataclasses.replace(plot, max_tokens=plot.cancel, cancel=None)
            expected = alone(name, limited)
            assert len(tokens) == len(expected)
            if not plot.scored:  # the limit is the caller's
                tokens, expected = ([(*token[:2], None) for token in some] for some in (tokens, expected))
            assert excluded(name, limited, tokens, expected) == 0
    assert paused > 2


# ------------------------------------------------------------------------------------------ fairness


def test_a_long_newcomer_and_a_stream_wait_for_each_other_no_longer_than_said():
    """A chunk and two steps at most between two tokens of the stream, and half as many steps again for the newcomer."""
    chunk, length = 512, 8192
    model = oracle.make_ours(
        {
            **oracle.slim(oracle.CONFIGS["medium-4k"]),
            "max_position_embeddings": 16_384,
            "original_max_position_embeddings": 16_384,
            "sliding_window": None,
            "num_hidden_layers": 1,
        }
    )
    newcomer = Job(ids_of(model, length, 0), 4)

    def until_first_token(runs, stream=None):
        """Steps until the newcomer's first token, and of each gap of the stream its steps and the tokens read in it.

        Those that only queue a pass, as on a CPU behind one that reads, are counted with the one that waits for it.
        """
        row, steps, gaps, gap = runs.submit(newcomer), 0, [], [0, 0]
        while not row.answer:
            step = runs.step()
            waited = bool(step.tokens or step.read)
            steps += waited
            gap = [gap[0] + waited, gap[1] + step.read_tokens]
            if any(token.row == stream for token in step.tokens):
                gaps.append(gap)
                gap = [0, 0]
        return steps, gaps

    alone, _ = until_first_token(Scheduler(model, room=math.inf, chunk=chunk, chunk_seconds=math.inf))
    runs = Scheduler(model, room=math.inf, chunk=chunk, chunk_seconds=math.inf)
    stream = runs.submit(Job(ids_of(model, 5, 1), 1000))
    while len(stream.answer) < 3:
        runs.step()
    steps, gaps = until_first_token(runs, stream.index)
    assert alone >= length // chunk
    assert steps <= 1.5 * alone
    assert len(gaps) >= length // chunk
    assert max(count for count, _ in gaps) <= 3
    assert max(read for _, read in gaps) <= chunk


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.usefixtures("sharing_at_once")
def test_places_of_rows_that_ended_wait_for_others_while_memory_is_to_spare(tight):
    """Four rows share arrays, two end, and one comes whose keys are packed: it needs the memory of their places."""
    model = MODELS["3.5-mini"]

    def run(room):
        runs = Scheduler(model, room=room, chunk=64)
        rows = [runs.submit(Job(ids_of(model, 60, i), 10 if i < 2 else 100)) for i in range(4)]
        most = 0.0
        while not all(row.finished for row in rows[:2]):
            for row in runs.step().ended:
                row.let_go()
            most = max(most, runs._plan.total)
        packed = runs.submit(Job(ids_of(model, 60, 9), 5, kv_bits=KVBits(8, 8)))
        runs.step()
        assert packed.begun
        return runs, rows[2:], most

    runs, rows, most = run(math.inf)
    _, rows, _ = run(most - runs._of_model.weights) if tight else (runs, rows, most)
    assert [len(array) for row in rows for array in row.cache[0].kept] == [2 if tight else 4] * 4


@pytest.mark.usefixtures("sharing_at_once")
def test_a_newcomer_joins_in_the_step_behind_a_row_that_ended_where_memory_is_measured():
    """Four rows share all the memory that there is; the pass that is queued when one ends still knows that row."""
    model = oracle.make_ours({**oracle.slim(oracle.CONFIGS["3.5-mini"]), "num_hidden_layers": 8})
    mx.eval(model.parameters())
    answers, runs, rows = _answers(model, 12)
    stop = next(token for i, token in enumerate(answers[0]) if i > 5 and token not in answers[0][:i])
    needed = runs._plan.total - runs._plan.weights
    del runs, rows
    gc.collect()
    mx.clear_cache()
    with memory_limit(int(mx.get_active_memory() + 1.03 * needed)):
        runs = Scheduler(model, chunk=64)
        rows = [
            runs.submit(Job(ids_of(model, 60, i), 400, stop_ids=frozenset({stop} if i == 0 else ()))) for i in range(4)
        ]
        runs.step()
        newcomer = runs.submit(Job(ids_of(model, 60, 9), 300))
        ended = []
        while not ended:
            ended = runs.step().ended
            assert not newcomer.begun
        assert ended == rows[:1]
        assert all(shares(row) for row in rows)
        ended.pop().let_go()
        runs.step()
        assert newcomer.begun


def shares(row):
    return isinstance(row.cache[0], SharedKVCache)


def _answers(model, tokens):
    """What four rows answer, at least so many tokens each; the scheduler and the rows."""
    runs = Scheduler(model, room=math.inf, chunk=64)
    rows = [runs.submit(Job(ids_of(model, 60, i), 400)) for i in range(4)]
    while min(len(row.answer) for row in rows) < tokens:
        runs.step()
    return [row.answer for row in rows], runs, rows
