"""The server's engine on a machine that reads prompts slowly: it is heard from, and hears, between short steps."""

import itertools
import threading

import pytest

from phi3_mlx.engine import batch
from phi3_mlx.generation.request import Request
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Begun, Ended, Piece, Reading, Work
from phi3_mlx.server.worker import Worker

PROMPT = [5, 9, 7, 11] * 200


@pytest.fixture
def worker(monkeypatch):
    """It reads 100 tokens a second by its clock."""
    now, queue_pass = [0.0], batch.queue_pass
    monkeypatch.setattr(batch.time, "perf_counter", lambda: now[0])

    def slow(*args):
        queued = queue_pass(*args)
        now[0] += queued.read_tokens / 100
        return queued

    monkeypatch.setattr(batch, "queue_pass", slow)
    worker = Worker(Models(["tiny"]))
    yield worker
    worker.close(wait=False)


def test_a_long_prompt_is_read_in_steps_of_a_second_though_nobody_is_answered(worker):
    told, over = [], threading.Event()

    def listener(event):
        told.append(event)
        if isinstance(event, Ended):
            over.set()

    worker.submit(Work("tiny", PROMPT, Request(max_tokens=1)), listener)
    assert over.wait(60)
    done = [event.done for event in told if isinstance(event, Reading)]
    assert done[0] == 32
    assert len(done) >= 7
    assert max(b - a for a, b in itertools.pairwise(done)) <= 101


def test_who_goes_while_the_prompt_is_read_ends_the_reading(worker):
    tickets, told, known, gone = [], [], threading.Event(), threading.Event()

    def listener(event):
        known.wait(60)
        told.append(event)
        tickets[0].cancel()
        gone.set()

    tickets.append(worker.submit(Work("tiny", PROMPT, Request(max_tokens=1)), listener))
    known.set()
    assert gone.wait(60)
    assert worker.alive(30)
    assert worker.alive(30)  # a whole step later
    assert worker.figures().running == 0
    assert worker.figures().read_tokens < 400
    assert len(told) == 1
    assert not isinstance(told[0], Begun)


def test_who_goes_while_several_answers_run_ends_them_all(worker):
    tickets, told, known, gone = [], [], threading.Event(), threading.Event()

    def listener(event):
        known.wait(60)
        told.append(event)
        if isinstance(event, Piece):
            tickets[0].cancel()
            gone.set()

    tickets.append(worker.submit(Work("tiny", PROMPT[:40], Request(max_tokens=500), n=8), listener))
    known.set()
    assert gone.wait(60)
    assert worker.alive(30)
    assert worker.alive(30)
    assert worker.figures().running == 0
    assert worker.figures().made_tokens < 100
    assert sum(isinstance(event, Piece) for event in told) == 1
