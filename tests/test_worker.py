"""The server's engine: requests of several models in one thread, each answered as if it were alone."""

import gc
import math
import random
import shutil
import threading
import time

import mlx.core as mx
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

import phi3_mlx
from phi3_mlx.adapters.folder import adapter_files, base_of, layer_shape, write_adapter
from phi3_mlx.adapters.lora import Adapter
from phi3_mlx.engine import machine
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import ClosedError, MemoryLimitError, ModelNotFoundError, Phi3Error, PromptError, QueueFullError
from phi3_mlx.generation.request import Request
from phi3_mlx.models.hooks import get_layer
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Begun, Ended, Failed, Piece, Reading, Work
from phi3_mlx.server.worker import Worker

SECONDS = 300  # more than any request here takes


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
def folder(tmp_path_factory):
    """The bundled model with other weights, and with one that is NaN."""
    tiny = ROOT / "weights" / "tiny"
    weights = mx.load(str(tiny / "model.safetensors"))
    other = {
        name: array * (1.3 if "mlp" in name and array.dtype == mx.float16 else 1) for name, array in weights.items()
    }
    name = next(name for name in weights if name.endswith("norm.weight"))
    for kind, arrays in {"other": other, "broken": {**weights, name: weights[name] * math.nan}}.items():
        copy = tmp_path_factory.getbasetemp() / kind
        shutil.copytree(tiny, copy)
        mx.save_safetensors(str(copy / "model.safetensors"), arrays, {"format": "mlx"})
    return tmp_path_factory.getbasetemp()


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


PROMPTS = [
    "Tell me a story of an owl.",
    "Once upon a time",
    [{"role": "user", "content": "Who are you?"}],
    [7, 8, 9] * 9,
]
OPTIONS = [
    {"max_tokens": 12},
    {"max_tokens": 9, "temperature": 0.8, "seed": 4},
    {"max_tokens": 14, "stop": ("e",)},
    {"max_tokens": 10, "regex": "[a-z ]{3,20}"},
    {"max_tokens": 8, "presence_penalty": 0.5, "logit_bias": {427: -5}},
    {"max_tokens": 11, "kv_bits": 8, "temperature": 1.0, "seed": 9},
]


def test_replies_are_generates_whatever_else_is_in_flight(folder):
    names = ["tiny", str(folder / "other")]
    models = {name: phi3_mlx.load(name) for name in names}
    expected = {
        (name, p, o): phi3_mlx.generate(*models[name], prompt, lookup=0, **options)
        for name in names
        for p, prompt in enumerate(PROMPTS)
        for o, options in enumerate(OPTIONS)
    }
    assert len({*expected.values()}) > 20
    chance, worker = random.Random(1), Worker(Models(names))
    asked, cancelled = [], []
    try:
        for _ in range(60):
            key = chance.choice(list(expected))
            name, p, o = key
            top, echo = chance.choice([None, 2]), chance.random() < 0.2
            ticket, heard = ask(worker, name, PROMPTS[p], 1, top, echo, **OPTIONS[o])
            if chance.random() < 0.25:
                threading.Event().wait(chance.random() * 0.02)
                ticket.cancel()
                cancelled.append((heard, len(heard.events)))
            else:
                asked.append((key, echo, heard))
        for key, echo, heard in asked:
            text = heard.wait().text()
            # Behind its prompt an answer keeps the space that it begins with.
            assert (text.removeprefix(" ") if echo else text) == expected[key], key
            assert not heard.of(Failed)
        assert [len(heard.events) for heard, _ in cancelled] == [count for _, count in cancelled]
        assert worker.alive()
        figures = worker.figures()
        assert (figures.running, figures.waiting) == (0, 0)
        assert figures.reused_tokens > 0
    finally:
        worker.close()


def test_requests_come_from_many_threads(worker, loaded):
    expected, wrong = phi3_mlx.generate(*loaded, "Hello", max_tokens=6), []

    def client():
        for _ in range(5):
            if ask(worker, "tiny", "Hello", max_tokens=6)[1].wait().text() != expected:
                wrong.append(1)

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not wrong


def test_memory_is_flat(worker):
    def requests(count):
        heard = [ask(worker, "tiny", [5 + i % 3, 6, 7], max_tokens=1 + i % 4)[1] for i in range(count)]
        for each in heard:
            each.wait()
        assert worker.alive()
        gc.collect()
        return mx.get_active_memory()

    first = requests(30)
    assert requests(90) - first < 200_000


def test_an_error_in_one_request_ends_it_alone(folder):
    worker = Worker(Models(["tiny", str(folder / "broken")]))
    try:
        good = [ask(worker, "tiny", "Hello", max_tokens=30)[1] for _ in range(2)]
        _, bad = ask(worker, str(folder / "broken"), "Hello")
        (failed,) = bad.wait().of(Failed)
        assert isinstance(failed.error, Phi3Error)
        assert "NaN" in str(failed.error)
        assert bad.events[-1] is failed
        assert len({each.wait().text() for each in good}) == 1
    finally:
        worker.close()


def test_a_listener_that_raises_ends_its_own_request(worker):
    told = []

    def raises(event):
        told.append(event)
        raise RuntimeError

    worker.submit(Work("tiny", "Hello", Request(max_tokens=200)), raises)
    _, heard = ask(worker, "tiny", "Hello", max_tokens=20)
    assert heard.wait().of(Ended)
    assert len(told) == 1


def test_what_waits_beyond_the_queue_is_refused_and_may_be_cancelled(monkeypatch):
    worker, go = Worker(Models(["tiny"]), queue=2), threading.Event()
    try:
        worker._messages.put(go.wait)
        tickets = [ask(worker, "tiny", "Hello", max_tokens=2) for _ in range(2)]
        assert worker.figures().waiting == 2
        with pytest.raises(QueueFullError, match="2 requests wait") as full:
            ask(worker, "tiny", "Hello")
        assert full.value.retry_after >= 1
        tickets[0][0].cancel()
        _, third = ask(worker, "tiny", "Hello", max_tokens=2)
        assert not worker.alive(0.05)
        go.set()
        assert third.wait().of(Ended)
        assert tickets[1][1].wait().of(Ended)
        assert not tickets[0][1].events
    finally:
        go.set()
        worker.close()


def test_a_thread_that_dies_fails_its_requests_and_is_seen(monkeypatch):
    worker = Worker(Models(["tiny"]))
    _, heard = ask(worker, "tiny", "Hello", max_tokens=1000)
    monkeypatch.setattr(worker, "_hand_over", lambda: 1 / 0)
    (failed,) = heard.wait().of(Failed)
    assert isinstance(failed.error, ClosedError)
    assert "ZeroDivisionError" in str(failed.error)
    assert not worker.alive()
    with pytest.raises(ClosedError, match="died"):
        ask(worker, "tiny", "Hello")
    worker.close()


def test_a_step_that_fails_ends_the_requests_of_its_model_and_the_next_is_answered(monkeypatch, loaded):
    worker = Worker(Models(["tiny"]))
    try:
        with monkeypatch.context() as patch:
            patch.setattr("phi3_mlx.engine.scheduler.Scheduler.step", lambda self: 1 / 0)
            assert isinstance(ask(worker, "tiny", "Hello")[1].wait().of(Failed)[0].error, ZeroDivisionError)
        expected = phi3_mlx.generate(*loaded, "Hello", max_tokens=5)
        assert ask(worker, "tiny", "Hello", max_tokens=5)[1].wait().text() == expected
    finally:
        worker.close()


@pytest.mark.parametrize("wait", [True, False])
def test_closing_finishes_what_runs_or_ends_it(wait, monkeypatch):
    worker, running = Worker(Models(["tiny"])), threading.Event()
    heard, step = Heard(), Worker._step
    if not wait:  # it must not be over by itself before
        monkeypatch.setattr(Worker, "_step", lambda worker, loaded: (time.sleep(0.02), step(worker, loaded)))

    def listen(event):
        heard(event)
        running.set()

    worker.submit(Work("tiny", "Hello", Request(max_tokens=60, regex="[a-z]{60}")), listen)
    assert running.wait(SECONDS)
    worker.close(wait)
    assert bool(heard.of(Ended)) == wait
    assert [type(event.error) for event in heard.of(Failed)] == ([] if wait else [ClosedError])
    assert worker.figures().running == 0


# ------------------------------------------------------------------------------------------ memory


def test_a_model_that_idles_is_put_away_for_what_another_has_to_do(folder, loaded):
    names = ["tiny", str(folder / "other")]
    size = sum(array.nbytes for _, array in tree_flatten(loaded[0].parameters()))
    prompt = phi3_mlx.encode_prompt(loaded[1], "Hello")
    needed = Workload.of_model(loaded[0], len(prompt) + 6).plan(0).total
    expected = {name: phi3_mlx.generate(*phi3_mlx.load(name), "Hello", max_tokens=6) for name in names}
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    worker = Worker(Models(names, memory=int((before + needed + 0.5 * size) * 16 / 15)))
    try:
        mx.reset_peak_memory()
        for name in [*names, *names]:
            _, heard = ask(worker, name, "Hello", max_tokens=6)
            assert not heard.wait().of(Failed)
            assert heard.text() == expected[name]
            assert worker.alive()
            assert worker.figures().loaded == (name,)
        assert mx.get_peak_memory() < worker.figures().memory_limit
    finally:
        worker.close()


def test_to_load_a_model_those_are_put_away_that_were_not_used_longest(folder, loaded, monkeypatch):
    names = ["tiny", str(folder / "other"), str(folder / "third")]
    shutil.copytree(folder / "other", folder / "third")
    size = sum(array.nbytes for _, array in tree_flatten(loaded[0].parameters()))
    gc.collect()
    models = Models(names)
    with machine.memory_limit(int(mx.get_active_memory() + 2.6 * size)):
        for name in (names[0], names[1], names[0], names[2]):
            models.get(name)
        assert [loaded.served.name for loaded in models.loaded()] == [names[0], names[2]]
        busy = [models.get(name).scheduler for name in (names[0], names[2])]
        monkeypatch.setattr(Scheduler, "busy", property(lambda scheduler: scheduler in busy))
        assert models.get(names[1]) is None
        busy.pop(0)
        assert models.get(names[1]) is not None
        assert [loaded.served.name for loaded in models.loaded()] == [names[2], names[1]]
    models.clear()


def test_an_adapter_is_a_model_of_its_own_that_shares_the_weights(tmp_path, loaded):
    model, _ = loaded
    base = base_of(ROOT / "weights" / "tiny", "tiny")
    path = "model.layers.0.self_attn.o_proj"
    rows, columns = layer_shape(get_layer(model, path))
    adapter = Adapter(mx.random.normal((columns, 4), key=mx.random.key(1)), mx.ones((4, rows)), 1.0)
    write_adapter(tmp_path, *adapter_files({path: adapter}, len(model.layers), base))
    adapted = phi3_mlx.load("tiny", adapter=tmp_path)
    expected = [phi3_mlx.generate(*each, "Hello", max_tokens=8) for each in (loaded, adapted)]
    assert expected[0] != expected[1]
    models = Models(["tiny"], {"tales": ("tiny", str(tmp_path))})
    assert [(card.name, card.about) for card in models.listed()] == [
        ("tiny", "tiny"),
        ("tales", f"tiny with the adapter {tmp_path}"),
    ]
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    gc.collect()
    before = mx.get_active_memory()
    worker = Worker(models)
    try:
        heard = [ask(worker, name, "Hello", max_tokens=8)[1] for name in ("tales", "tiny", "tales")]
        assert [each.wait().text() for each in heard] == [expected[1], expected[0], expected[1]]
        assert worker.figures().loaded == ("tales", "tiny")
        assert mx.get_active_memory() - before < 1.6 * size
    finally:
        worker.close()


def test_what_never_fits_is_refused_with_the_numbers(loaded):
    gc.collect()
    before = mx.get_active_memory()
    size = sum(array.nbytes for _, array in tree_flatten(loaded[0].parameters()))
    for room, match in [(0.2 * size, "tiny needs"), (1.5 * size + 2_000_000, "may be used")]:
        worker = Worker(Models(["tiny"], memory=int((before + room) * 16 / 15)))
        try:
            _, heard = ask(worker, "tiny", [5] * 3000, max_tokens=900)
            assert isinstance(heard.wait().of(Failed)[0].error, MemoryLimitError)
            assert match in str(heard.of(Failed)[0].error)
            assert worker.alive()
        finally:
            worker.close()
