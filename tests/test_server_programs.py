"""Open WebUI (also in Docker), Continue and Zed over a socket: the bytes that they send, and what they read of it.

The requests are written after what these programs do: header names and order of aiohttp, Node and Rust's HTTP clients,
the fields that their providers set, the `Host` of a name that Docker makes.
"""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import FakeEngine, error_in, raw, serving, wait_until
from test_server_attack import a_server
from test_server_tools import ARGUMENTS, call_tools

from phi3_mlx.server.work import Begun, Piece

AIOHTTP = """\
POST /v1/chat/completions HTTP/1.1
Host: {host}
Content-Type: application/json
X-OpenWebUI-User-Name: Jos%C3%A9
X-OpenWebUI-Chat-Id: 7b1c
Authorization: Bearer {key}
Accept: */*
Accept-Encoding: gzip, deflate, br
User-Agent: Python/3.11 aiohttp/3.12.15
"""
LIST_OF_AIOHTTP = """\
GET /v1/models HTTP/1.1
Host: {host}
Authorization: Bearer {key}
Accept: */*
Accept-Encoding: gzip, deflate, br
User-Agent: Python/3.11 aiohttp/3.12.15
"""
NODE = """\
POST /v1/chat/completions HTTP/1.1
accept: application/json
authorization: Bearer {key}
api-key: {key}
content-type: application/json
user-agent: OpenAI/JS 5.13.1
x-stainless-lang: js
x-stainless-retry-count: 0
accept-encoding: gzip,deflate
connection: keep-alive
host: {host}
"""
RUST = """\
POST /v1/chat/completions HTTP/1.1
content-type: application/json
authorization: Bearer {key}
user-agent: Zed/0.200.0 (linux; x86_64)
accept: */*
host: {host}
"""
USER = {"role": "user", "content": "one two three"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
NOW = {"type": "function", "function": {"name": "now", "description": None, "parameters": None}}  # a Rust Option
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of some days.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}},
    },
}
PROGRAMS = {
    "Open WebUI": (AIOHTTP, {
        "stream": True, "model": "echo", "messages": [{"role": "system", "content": "Be kind."}, USER],
        "temperature": 0.7, "max_tokens": 128, "logit_bias": {}, "stream_options": {"include_usage": True},
    }),
    "Continue": (NODE, {
        "messages": [USER], "model": "echo", "max_tokens": 4096, "temperature": 0.5, "top_p": 1,
        "frequency_penalty": 0, "presence_penalty": 0, "stream": True, "stop": ["<|end|>", "<|user|>"],
        "stream_options": {"include_usage": True},
    }),
    "Zed": (RUST, {
        "model": "echo", "messages": [{"role": "system", "content": "You are an engineer."}, USER],
        "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 2048, "temperature": 1.0,
    }),
}  # fmt: skip
DOCKER = "host.docker.internal:8080"


def request(head, body=None, *, host="127.0.0.1:8080", key="none", last=True):
    """The bytes of a request, with the connection's end behind its answer if it is the `last`."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = head.format(host=host, key=key).splitlines()
    lines = [line for line in lines if not (last and line.lower() == "connection: keep-alive")]
    lines += [] if body is None else [f"Content-Length: {len(data)}"]
    lines += ["Connection: close"] if last else []
    return "\r\n".join([*lines, "", ""]).encode() + data


def received(served, *requests):
    """All that comes back for requests on one connection."""
    with raw(served, b"".join(requests)) as connection:
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def unchunked(answer):
    """Status, headers and text of a whole answer, whose body may be in chunks."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") != "chunked":
        return int(first.split()[1]), headers, body.decode()
    text = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return int(first.split()[1]), headers, text.decode()


def as_zed_reads(text):
    """The events of a stream, each with the fields and types that Zed's reader must find, or it ends the thread."""
    events = []
    for line in text.split("\n"):
        if not line.startswith("data: "):
            assert not line or line.startswith(":")
            continue
        if line == "data: [DONE]":
            return events
        event = json.loads(line.removeprefix("data: "))
        for choice in event["choices"]:
            assert isinstance(choice["index"], int)
            assert choice["delta"].get("content") is None or isinstance(choice["delta"]["content"], str)
            assert choice["delta"].get("role") in (None, "assistant")
            for call in choice["delta"].get("tool_calls") or ():
                assert isinstance(call["index"], int)
        if event.get("usage") is not None:
            assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= {*event["usage"]}
        events.append(event)
    raise AssertionError("the stream has no end")


def said_in(events):
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_chat_is_streamed_as_each_program_reads_it(program):
    head, body = PROGRAMS[program]
    with serving() as served:
        status, headers, text = unchunked(received(served, request(head, body)))
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        assert "content-encoding" not in headers  # though they would take it: a compressed stream waits
        events = as_zed_reads(text)
        assert said_in(events) == "one two three "
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 3
        work = served.engine.tickets[-1].work
        assert work.request.temperature == body["temperature"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_tools_come_as_each_program_sends_and_reads_them(program):
    head, body = PROGRAMS[program]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    empty = {"role": "tool", "content": [], "tool_call_id": "call_1"}
    body = {**body, "messages": [USER, called, empty], "tools": [NOW, WEATHER], "tool_choice": "auto"}
    with serving(FakeEngine(call_tools)) as served:
        events = as_zed_reads(unchunked(received(served, request(head, body)))[2])
        parts = [
            part for event in events for choice in event["choices"] for part in choice["delta"].get("tool_calls", ())
        ]
        assert [part["function"]["name"] for part in parts if "id" in part] == ["weather", "now"]
        for index, arguments in enumerate(ARGUMENTS):
            assert "".join(p["function"]["arguments"] for p in parts if p["index"] == index) == arguments
        assert "tool_calls" in [choice["finish_reason"] for event in events for choice in event["choices"]]


def test_one_connection_serves_the_list_of_models_and_then_chats():
    head, body = PROGRAMS["Open WebUI"]
    whole = {**body, "stream": False}
    del whole["stream_options"]
    requests = [request(LIST_OF_AIOHTTP, last=False), request(head, whole, last=False), request(head, whole)]
    with serving() as served:
        answer = received(served, *requests)
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.count(b'"id":"echo"') == 1
        assert answer.count(b"one two three ") == 2


@pytest.mark.parametrize(
    ("host", "allowed", "status"),
    [
        (DOCKER, [], 403),
        (DOCKER, ["host.docker.internal"], 200),
        ("Host.Docker.Internal:8080", ["host.docker.internal"], 200),
        (DOCKER, ["gateway.docker.internal"], 403),
        (DOCKER, ["*"], 200),
        ("172.17.0.1:8080", [], 200),  # the bridge's address, which is a name of nobody's
        ("[fd00::1]:8080", [], 200),
    ],
)
def test_the_name_that_docker_makes_is_taken_where_it_is_allowed(host, allowed, status):
    head, body = PROGRAMS["Open WebUI"]
    with serving(hosts=allowed) as served:
        answer = received(served, request(head, body, host=host))
        assert unchunked(answer)[0] == status
        assert unchunked(received(served, request(LIST_OF_AIOHTTP, host=host)))[0] == status
        assert len(served.engine.tickets) == (status == 200)
        if status == 403:
            assert error_in(answer) == (403, "host_not_allowed")
            assert b"--allowed-host" in answer


def test_a_key_is_that_of_every_request_of_a_container():
    head, body = PROGRAMS["Open WebUI"]
    with serving(hosts=["host.docker.internal"], key="secret") as served:
        for key, status in (("secret", 200), ("none", 401), ("", 401)):
            assert unchunked(received(served, request(head, body, host=DOCKER, key=key)))[0] == status
            assert unchunked(received(served, request(LIST_OF_AIOHTTP, host=DOCKER, key=key)))[0] == status


@pytest.mark.parametrize(("options", "status"), [((), 403), (("--allowed-host", "host.docker.internal"), 200)])
def test_the_command_allows_the_name_as_the_page_says(options, status):
    class Served:
        pass

    with a_server(*options) as (Served.port, _):
        assert unchunked(received(Served, request(LIST_OF_AIOHTTP, host=DOCKER)))[0] == status


def test_a_program_that_stops_an_answer_ends_its_request():
    """Continue's and Zed's stop button closes the connection; Open WebUI's does so behind its own stream."""

    def endless(ticket, tell):
        tell(Begun(3, 0))
        while not ticket.cancelled.wait(0.01):
            tell(Piece(0, "more ", ()))

    for head, body in PROGRAMS.values():
        with serving(FakeEngine(endless)) as served:
            with raw(served, request(head, body, last=False)) as connection:
                told = b""
                while b"more " not in told:
                    told += connection.recv(65536)
            wait_until(served.engine.tickets[-1].cancelled.is_set)
