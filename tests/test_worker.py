"""The server's engine: requests of several models in one thread, each answered as if it were alone."""

import threading

import pytest

import phi3_mlx
from phi3_mlx.errors import ClosedError, ModelNotFoundError, PromptError
from phi3_mlx.generation.request import Request
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Begun, Ended, Failed, Piece, Reading, Work
from phi3_mlx.server.worker import Worker

SECONDS = 60  # more than any request here takes


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.events, self._over, self._left = [], threading.Event(), None

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Failed) or (isinstance(event, Ended) and self.of(Ended, all_of=max(self.n, 1))):
            self._over.set()

    n = 1

    def of(self, kind, all_of=None):
        found = [event for event in self.events if isinstance(event, kind)]
        return found if all_of is None else len(found) == all_of

    def wait(self):
        assert self._over.wait(SECONDS), self.events
        return self

    def text(self, index=0):
        return "".join(piece.text for piece in self.of(Piece) if piece.index == index)


def ask(worker, model, prompt, n=1, top_logprobs=None, echo=False, **options):
    heard = Heard()
    heard.n = n
    ticket = worker.submit(Work(model, prompt, Request(**options), n, top_logprobs, echo), heard)
    return ticket, heard


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


@pytest.fixture(scope="module")
def worker():
    worker = Worker(Models(["tiny"]))
    yield worker
    worker.close()


def test_a_reply_is_what_generate_gives(worker, loaded):
    for prompt, options in [
        ("Tell me a story of an owl.", {"max_tokens": 20}),
        ([{"role": "user", "content": "Hello"}], {"max_tokens": 9, "temperature": 0.9, "seed": 3}),
        ([5, 6, 7], {"max_tokens": 5, "stop": ("a",)}),
        ("Once upon", {"raw": True, "choices": ("yes", "no")}),
    ]:
        _, heard = ask(worker, "tiny", prompt, **options)
        assert heard.wait().text() == phi3_mlx.generate(*loaded, prompt, **options)
        kinds = [type(event) for event in heard.events if not isinstance(event, Reading)]
        assert kinds[0] is Begun
        assert kinds[-1] is Ended
        assert {*kinds[1:-1]} <= {Piece}


def test_several_answers_share_one_reading(worker, loaded):
    prompt = "Tell me of a fox that " + "never stops running, " * 20
    before = worker.figures().read_tokens
    _, heard = ask(worker, "tiny", prompt, n=3, temperature=1.0, seed=8, max_tokens=12)
    heard.wait()
    tokens = heard.of(Begun)[0].prompt_tokens
    assert worker.figures().read_tokens - before == tokens + 2
    texts = [phi3_mlx.generate(*loaded, prompt, temperature=1.0, seed=8 + i, max_tokens=12) for i in range(3)]
    assert [heard.text(i) for i in range(3)] == texts
    assert len({*texts}) == 3


def test_what_can_be_told_at_once_is_refused_at_once(worker):
    with pytest.raises(ModelNotFoundError, match="'giant'"):
        ask(worker, "giant", "Hi")
    with pytest.raises(PromptError, match="empty"):
        ask(worker, "tiny", " ")
    with pytest.raises(PromptError, match="context is") as error:
        ask(worker, "tiny", [5] * 10_000_000)
    assert error.value.tokens == 10_000_000


def test_a_closed_worker_takes_nothing():
    worker = Worker(Models(["tiny"]))
    assert worker.alive()
    worker.close()
    assert not worker.alive()
    with pytest.raises(ClosedError):
        ask(worker, "tiny", "Hi")
