"""Models of other families in the server: many requests at once, clients that go, and memory."""

import gc
import json
import math
import time

import pytest
from conftest import long_after

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import mlx.core as mx
from mlx.utils import tree_flatten
from other_models import CONTROL, make_checkpoint
from served import chat_body, events, raw, serving, wait_until
from test_worker import ask

import phi3_mlx
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.plan import Workload, plan_together
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Begun, Ended, Failed, Piece
from phi3_mlx.server.worker import Worker

SERVED = ("llama", "gemma3_text", "mamba")  # caches of all tokens, of a window of them, and of none
ENDLESS = {256 + number: -100.0 for number in range(len(CONTROL))}  # so no token ends an answer
PROMPTS = [[1 + (7 * n + length) % 250 for n in range(length)] for length in (1, 5, 40, 90, 200)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("served")
    return {kind: str(make_checkpoint(base / kind, kind)) for kind in SERVED}


@pytest.fixture(scope="module")
def worker(folders):
    worker = Worker(Models([*folders.values(), "tiny"]))
    yield worker
    worker.close(wait=False)


def slowed(monkeypatch, seconds):
    """Each step of the worker takes as long at least, so that an answer is not over before somebody goes."""
    step = Worker._step
    monkeypatch.setattr(Worker, "_step", lambda worker, loaded: (time.sleep(seconds), step(worker, loaded)))


def idle(worker):
    return worker.alive() and worker.figures().running == worker.figures().waiting == 0


def test_many_requests_at_once_are_what_generate_gives_each(folders, worker):
    options = [{"max_tokens": 20}, {"max_tokens": 9, "temperature": 1.0, "seed": 4}, {"max_tokens": 30, "stop": ("e",)}]
    asked = [
        (name, prompt, options[number % 3], ask(worker, name, prompt, **options[number % 3])[1])
        for name in (*folders.values(), "tiny")
        for number, prompt in enumerate(PROMPTS)
    ]
    loaded = {name: phi3_mlx.load(name) for name in (*folders.values(), "tiny")}
    for name, prompt, given, heard in asked:
        assert heard.wait().text() == phi3_mlx.generate(*loaded[name], prompt, **given)
        assert heard.of(Begun)[0].cached_tokens == 0 or name == "tiny"


@pytest.mark.parametrize("kind", SERVED)
def test_one_that_is_cancelled_leaves_the_others_and_no_memory_behind(kind, folders, worker, monkeypatch):
    name, endless = folders[kind], {"max_tokens": 150, "logit_bias": ENDLESS}
    expected = ask(worker, name, PROMPTS[2], **endless)[1].wait().text()
    wait_until(lambda: idle(worker))
    gc.collect()
    held = mx.get_active_memory()
    slowed(monkeypatch, 0.005)
    ticket, heard = ask(worker, name, PROMPTS[3], **endless)
    _, other = ask(worker, name, PROMPTS[2], **endless)
    wait_until(lambda: heard.of(Piece))
    ticket.cancel()
    told = len(heard.events)
    assert other.wait().text() == expected
    assert len(heard.events) == told
    assert not heard.of(Ended)
    wait_until(lambda: idle(worker))
    gc.collect()
    assert mx.get_active_memory() <= held + 20_000


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_ends_its_request(folders, worker, streamed, monkeypatch):
    body = chat_body("Hello", model=folders["mamba"], max_tokens=4000, stream=streamed)
    body["logit_bias"] = {str(token): bias for token, bias in ENDLESS.items()}
    models = worker._models
    with serving(worker, listed=models.listed, others=models.others) as served:
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        made = worker.figures().made_tokens
        slowed(monkeypatch, 0.02)
        with raw(served, head.encode() + data):
            wait_until(lambda: worker.figures().made_tokens > made)
        wait_until(lambda: idle(worker))
        assert worker.figures().made_tokens - made < 300  # of those that the context of 400 tokens has room for
        monkeypatch.undo()
        reply = served.chat("Hello", model=folders["mamba"], max_tokens=3)[2]
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert reply["system_fingerprint"].endswith("-with-mlx-lm")
        body = {"model": "tiny", "prompt": "Mia", "max_tokens": 1}
        for name in ("tiny", folders["mamba"]):
            reply = served.request("POST", "/v1/completions", {**body, "model": name})[2]
            assert reply["system_fingerprint"].endswith("-with-mlx-lm") == (name != "tiny")
        reply = served.chat("Hello", model=folders["mamba"], max_tokens=3)[2]
        data, _ = events(served.chat("Hello", model=folders["mamba"], max_tokens=3, stream=True)[2])
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in data[:-1])
        assert text == reply["choices"][0]["message"]["content"]
        cards = served.request("GET", "/v1/models")[2]["data"]
        told = ["exactness is promised for the Phi family alone" in card["description"] for card in cards]
        assert told == [card["id"] != "tiny" for card in cards]


@pytest.mark.parametrize("kind", SERVED)
def test_within_a_limit_some_wait_and_what_never_fits_is_told_with_the_numbers(kind, folders):
    name = folders[kind]
    model, tokenizer = phi3_mlx.load(name)
    expected = [phi3_mlx.generate(model, tokenizer, prompt, max_tokens=40) for prompt in PROMPTS]
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    one = max(Workload.of_model(model, len(prompt) + 40).plan(0).total for prompt in PROMPTS) - size
    never = Workload.of_model(model, 399).plan(0).total - size
    assert never > 1.4 * one
    del model
    gc.collect()
    mx.clear_cache()
    limit = int((mx.get_active_memory() + size + 1.2 * one) * 16 / 15)
    worker = Worker(Models([name], memory=limit))
    try:
        ask(worker, name, PROMPTS[0], max_tokens=1)[1].wait()
        mx.reset_peak_memory()
        heard = [ask(worker, name, prompt, max_tokens=40)[1] for prompt in PROMPTS * 2]
        (failed,) = ask(worker, name, [5] * 350, max_tokens=49)[1].wait().of(Failed)
        assert [each.wait().text() for each in heard] == expected * 2
        assert mx.get_peak_memory() <= limit
        assert isinstance(failed.error, MemoryLimitError)
        assert "may be used" in str(failed.error)
    finally:
        worker.close(wait=False)


# A mamba's estimate does not grow with the answer.
@pytest.mark.parametrize("kind", long_after(1, ["llama", "gemma3_text"]))
def test_answers_without_a_limit_pause_and_go_on_where_memory_is_short(kind, folders, monkeypatch):
    model, _ = phi3_mlx.load(folders[kind])
    monkeypatch.setattr("phi3_mlx.engine.fitting.ANSWER_BLOCK", 16)
    monkeypatch.setattr("phi3_mlx.engine.scheduler.ANSWER_BLOCK", 16)
    paused, pause = [], Row.pause
    monkeypatch.setattr(Row, "pause", lambda row: paused.append(len(row.answer)) or pause(row))

    def answers(room):
        scheduler = Scheduler(model, chunk=16, room=room)
        rows = [scheduler.submit(Job(prompt)) for prompt in PROMPTS[1:4]]
        while scheduler.busy:
            scheduler.step()
            for row in rows:
                if len(row.answer) >= 250:
                    row.finish()
        assert [row.error for row in rows] == [None] * 3
        return [row.answer[:250] for row in rows]

    expected = answers(math.inf)
    assert not paused
    two = plan_together([Workload.of_model(model, 120)] * 2, 0)  # caches grow by 256 tokens
    assert answers(two.total - two.weights) == expected
    assert any(paused)


def test_a_request_beside_many_fails_alone(folders, worker):
    good = [ask(worker, folders["llama"], prompt, max_tokens=12)[1] for prompt in PROMPTS]
    _, wrong = ask(worker, folders["llama"], PROMPTS[1], max_tokens=4, kv_bits=4)
    assert "kv_bits is for the Phi family alone" in str(wrong.wait().of(Failed)[0].error)
    loaded = phi3_mlx.load(folders["llama"])
    for prompt, heard in zip(PROMPTS, good, strict=True):
        assert heard.wait().text() == phi3_mlx.generate(*loaded, prompt, max_tokens=12)


def test_two_are_put_away_for_each_other(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    names = [str(make_checkpoint(tmp_path / kind, kind, **wide)) for kind in ("llama", "qwen3")]
    expected = {name: phi3_mlx.generate(*phi3_mlx.load(name), PROMPTS[2], max_tokens=6) for name in names}
    gc.collect()
    mx.clear_cache()
    models = Models(names)
    needed = max(models._loading_bytes(models.source(name)) for name in names)
    run = Workload.of_model(phi3_mlx.load(names[0])[0], 50).plan(0)
    gc.collect()
    limit = int((mx.get_active_memory() + needed + run.total - run.weights) * 16 / 15)
    worker = Worker(Models(names, memory=limit))
    try:
        for name in names * 2:
            assert ask(worker, name, PROMPTS[2], max_tokens=6)[1].wait().text() == expected[name]
            assert worker.figures().loaded == (name,)
    finally:
        worker.close(wait=False)
