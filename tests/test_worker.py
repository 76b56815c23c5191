"""The server's engine: requests of several models in one thread, each answered as if it were alone."""

import threading

import mlx.core as mx
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


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("top_logprobs", [None, 0, 3])
def test_an_echoed_prompt_is_scored_as_score_does(worker, loaded, n, top_logprobs):
    model, tokenizer = loaded
    prompt = "Once upon a time there was an owl, dünn und weiß, \U0001f989."
    _, heard = ask(worker, "tiny", prompt, n, top_logprobs, True, raw=True, max_tokens=1)
    (begun,) = heard.wait().of(Begun)
    assert [(end.index, end.tokens) for end in heard.of(Ended)] == ([(i, 1) for i in range(n)] or [(0, 0)])
    assert len(heard.of(Piece)) == n
    ids = phi3_mlx.encode_prompt(tokenizer, prompt, raw=True)
    assert [token.id for token in begun.echo] == ids
    assert begun.prompt_tokens == len(ids)
    assert begun.text == tokenizer.decode(ids)
    (score,) = phi3_mlx.score(model, tokenizer, ids[:1], [ids[1:]])
    if top_logprobs is None:
        assert {token.logprob for token in begun.echo} == {None}
    else:
        assert begun.echo[0].logprob is None
        assert [token.logprob for token in begun.echo[1:]] == pytest.approx(score.logprobs, abs=1e-4)
        for token in begun.echo[1:]:
            assert len(token.top) == top_logprobs
            assert all(other.text == tokenizer.token_bytes(other.id) for other in token.top)
            assert not token.top or token.logprob <= token.top[0].logprob + 1e-6


def test_tokens_say_where_in_the_text_they_begin(worker, loaded):
    prompt = "Ein Märchen: \U0001f989 sprach – „hu“."
    _, heard = ask(worker, "tiny", prompt, n=0, echo=True, raw=True)
    (begun,) = heard.wait().of(Begun)
    tokens = [token for token in begun.echo if token.id not in loaded[1].special_ids]
    for first, token in enumerate(tokens):
        if token.text.isascii():
            spelled = token.text.decode().removeprefix(" " if first == 0 else "")
            assert begun.text[token.offset :].startswith(spelled)
    inside = [token.offset for token in tokens if 0x80 <= token.text[0] < 0xC0]
    assert inside
    assert {*inside} <= {token.offset for token in tokens if token.text[0] >= 0xC0}


def test_tokens_are_told_with_the_likeliest_in_their_places(worker, loaded):
    model, tokenizer = loaded
    form = {"choices": ("yes, it is", "no, it is not", "nobody knows")}
    _, heard = ask(worker, "tiny", "Is it?", top_logprobs=4, **form)
    said = phi3_mlx.encode_prompt(tokenizer, "Is it?")
    for piece in heard.wait().of(Piece):
        (token,) = piece.tokens
        logits = model(mx.array([said]))[0, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-4)
        best = mx.argsort(-logprobs)[:4].tolist()
        assert [other.id for other in token.top] == best
        assert [other.logprob for other in token.top] == pytest.approx(logprobs[mx.array(best)].tolist(), abs=1e-4)
        said.append(token.id)
    assert heard.text() in form["choices"]


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
