"""Completions, responses and several answers, many at once, whole and streamed: each text is what `generate` gives."""

import json
import threading

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import serving

from phi3_mlx import generate, load
from phi3_mlx.generation.request import Request
from phi3_mlx.server.models import Models
from phi3_mlx.server.worker import Worker

WARM = {"temperature": 0.9, "seed": 3}
STORY = "Once upon a time, there was a little"
# The address, the body, and for each text that it tells what `generate` is asked.
ASKED = [
    ("completions", {"prompt": STORY}, [(STORY, {"raw": True})]),
    ("completions", {"prompt": [STORY, "The owl"], "stop": "."},
     [(prompt, {"raw": True, "stop": "."}) for prompt in (STORY, "The owl")]),
    ("completions", {"prompt": STORY, "n": 2, **WARM},
     [(STORY, {"raw": True, **WARM, "seed": seed}) for seed in (3, 4)]),
    ("completions", {"prompt": [300, 301, 302], "logprobs": 2}, [([300, 301, 302], {})]),
    ("completions", {"prompt": STORY, "regex": "(duck|frog)s?"}, [(STORY, {"raw": True, "regex": "(duck|frog)s?"})]),
    ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "n": 3, **WARM},
     [([{"role": "user", "content": "Hi"}], {**WARM, "seed": seed}) for seed in (3, 4, 5)]),
    ("responses", {"input": "Tell me of a duck."}, [([{"role": "user", "content": "Tell me of a duck."}], {})]),
    ("responses", {"input": "Hi", "instructions": "Be kind.", **WARM},
     [([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], WARM)]),
]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    models = Models(["tiny"])
    worker = Worker(models)
    with serving(worker, base=Request(lookup=0), listed=models.listed) as served:
        yield served
    worker.close(wait=False)


def texts(path, reply):
    """The texts of a whole reply."""
    if path == "responses":
        return ["".join(part["text"] for item in reply["output"] for part in item["content"])]
    if path == "completions":
        return [choice["text"] for choice in reply["choices"]]
    return [choice["message"]["content"] for choice in reply["choices"]]


def streamed_texts(path, stream, count):
    """The texts of a stream, put together."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: {")]
    told = ["" for _ in range(count)]
    for event in map(json.loads, lines):
        if path == "responses":
            told[0] += event["delta"] if event["type"] == "response.output_text.delta" else ""
        for choice in event.get("choices", ()):
            told[choice["index"]] += choice["text"] if path == "completions" else choice["delta"].get("content") or ""
    return told


def test_every_address_tells_what_generate_gives_whatever_else_is_in_flight(served):
    told = {}

    def ask(number, stream):
        path, body, expected = ASKED[number]
        most = "max_output_tokens" if path == "responses" else "max_tokens"
        body = {"model": "tiny", most: 12, "stream": stream, **body}
        reply = served.request("POST", f"/v1/{path}", body, seconds=120)
        assert reply[0] == 200, reply
        told[number, stream] = streamed_texts(path, reply[2], len(expected)) if stream else texts(path, reply[2])

    asks = [(number, stream) for number in range(len(ASKED)) for stream in (False, True)]
    threads = [threading.Thread(target=ask, args=each) for each in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model, tokenizer = load("tiny")
    for number, stream in asks:
        path, body, wanted = ASKED[number]
        expected = [generate(model, tokenizer, prompt, max_tokens=12, **options) for prompt, options in wanted]
        assert told[number, stream] == expected, (path, body, stream)
