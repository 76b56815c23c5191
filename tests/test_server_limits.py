"""What clients do to a server that should not fall over: slow, gone, huge, malformed and forbidden requests."""

import asyncio
import http.client
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from served import PATIENCE, USUAL, FakeEngine, all_of, chat_body, error_in, events, raw, serving, token, wait_until
from uvicorn.server import ServerState

from phi3_mlx.errors import (
    ChatError,
    ClosedError,
    ContextLengthError,
    MemoryLimitError,
    Phi3Error,
    PromptError,
    QueueFullError,
)
from phi3_mlx.server.connections import connections_within
from phi3_mlx.server.limits import Limits
from phi3_mlx.server.work import Begun, Ended, Piece, Reading

QUICK = Limits(header_seconds=0.3, body_seconds=0.3)


def post(body, **headers):
    """The bytes of a request; `body` bytes are sent as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"host": "127.0.0.1", "content_length": len(data), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + data


# Slow, long, deep and many.


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_headers_that_do_not_come_are_given_up(sent):
    with serving(limits=QUICK) as served:
        begun = time.monotonic()
        assert error_in(all_of(raw(served, sent))) == (408, "request_timeout")
        assert 0.25 < time.monotonic() - begun < USUAL.header_seconds


def test_headers_that_trickle_are_given_up_though_bytes_come():
    with serving(limits=QUICK) as served, raw(served, b"GET /health HTTP/1.1\r\n") as connection:
        begun = time.monotonic()
        while time.monotonic() - begun < USUAL.header_seconds:
            try:
                connection.sendall(b"x: y\r\n")
            except OSError:
                return
            time.sleep(0.02)
        pytest.fail("the connection stayed")


def test_a_further_request_on_a_connection_has_the_same_time():
    with serving(limits=Limits(header_seconds=1)) as served:
        connection = raw(served, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while b'"ok"' not in answer:
            answer += connection.recv(65536)
        begun = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert all_of(connection) == b""
        assert time.monotonic() - begun < USUAL.idle_seconds - 5


def test_long_headers_are_refused():
    with serving(limits=Limits(header_bytes=2000)) as served:
        head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nx: "
        assert error_in(all_of(raw(served, head + b"y" * 3000 + b"\r\n\r\n"))) == (431, "headers_too_large")
        assert error_in(all_of(raw(served, head + b"y" * 70_000)))[0] == 400


def test_what_is_no_http_is_refused_in_openais_form():
    with serving() as served:
        assert error_in(all_of(raw(served, b"\x16\x03\x01 hello\r\n\r\n"))) == (400, "invalid_request")


def test_a_body_that_does_not_come_is_given_up():
    with serving(limits=QUICK) as served:
        assert error_in(all_of(raw(served, post(b"{", content_length=100)))) == (408, "request_timeout")


def test_a_body_that_is_too_large_is_refused_before_it_has_come():
    with serving(limits=Limits(body_bytes=1000)) as served:
        assert error_in(all_of(raw(served, post(b"{", content_length=1001)))) == (413, "request_too_large")
        chunked = post(b"", transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
        answer = all_of(raw(served, chunked + b"400\r\n" + b"[" * 1024 + b"\r\n"))
        assert error_in(answer) == (413, "request_too_large")


def test_bodies_on_their_way_are_bounded_together():
    with serving(limits=Limits(body_bytes=1000, bodies_bytes=1500)) as served:
        half = post(b"[" * 900, content_length=1000)
        with raw(served, half):
            assert served.request("GET", "/health")[0] == 200  # the loop has read what came before
            answer = all_of(raw(served, half))
        assert error_in(answer) == (429, "rate_limit_exceeded")
        assert b"retry-after: 1" in answer.lower()
        assert served.chat()[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"model": "\\ud800"}',
        b'{"model": "a", "model": "b"}',
        b'{"model": "a", "user": "\\udc80"}',
        b'{"\\udc80": 1}',
        b'{"metadata": {"a": NaN}}',
        b'{"metadata": {"a": -Infinity}}',
        b'{"metadata": {"a": 1e999}}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"user": ' + b"[" * 65 + b"]" * 65 + b"}",
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_within_limits_is_refused(body):
    with serving() as served:
        status, _, reply = served.request("POST", "/v1/chat/completions", raw=body)
        assert (status, reply["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("values", [b"[]", b"{}", b"1"])
def test_a_body_of_millions_of_values_is_refused_before_it_is_read(values):
    most = 1_000_000 // (1 if values == b"1" else 2)
    with serving() as served:
        for count, status in ((most + 2, 413), (most - 10, 400)):
            body = b'{"model": "echo", "messages": [' + b",".join([values] * count) + b"]}"
            assert served.request("POST", "/v1/chat/completions", raw=body)[0] == status
        assert served.chat("comma, " * 300_000)[0] == 200


def test_one_connection_too_many_is_told_so_and_the_others_go_on():
    with serving(limits=Limits(connections=3, header_seconds=60)) as served:
        held = [raw(served) for _ in range(3)]
        wait_until(lambda: len(served.server.server_state.connections) == 3)
        assert error_in(all_of(raw(served))) == (503, "too_many_connections")
        held.pop().close()
        wait_until(lambda: len(served.server.server_state.connections) == 2)
        assert served.request("GET", "/health")[0] == 200
        for connection in held:
            connection.close()


# Clients that go, or do not read.


def endless(ticket, tell):
    """An answer without an end, as fast as it is read by nobody."""
    tell(Begun(1, 0))
    while not ticket.cancelled.is_set():
        tell(Piece(0, "x" * 1000, (token("x", 0),)))
        time.sleep(0.001)


def silent(ticket, tell):
    """A prompt that takes long to read."""
    for done in range(10_000):
        if ticket.cancelled.is_set():
            return
        tell(Reading(done, 10_000))
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [endless, silent])
def test_a_client_that_goes_ends_its_request_at_once(script, stream):
    with serving(FakeEngine(script), limits=Limits(comment_seconds=0.1)) as served:
        connection = raw(served, post(chat_body(stream=stream)))
        wait_until(lambda: served.engine.tickets)
        if stream:
            connection.recv(100)
        connection.close()
        assert served.engine.tickets[0].cancelled.wait(20)  # a client that only reads nothing has 30
        wait_until(lambda: not served.server.server_state.tasks)


@pytest.mark.parametrize("limit", [{"unread_bytes": 100_000, "stuck_seconds": 60.0}, {"stuck_seconds": 0.5}])
def test_a_client_that_does_not_read_loses_its_request_and_holds_up_nobody(limit):
    with serving(FakeEngine(endless), limits=Limits(**limit)) as served:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(post(chat_body(stream=True)))
            wait_until(lambda: served.engine.tickets)
            assert served.request("GET", "/health")[0] == 200
            assert served.engine.tickets[0].cancelled.wait(PATIENCE), "the engine still works for nobody"
            if "unread_bytes" not in limit:  # the connection is given up too
                wait_until(lambda: not served.server.server_state.connections)
        wait_until(lambda: not served.server.server_state.tasks)


def test_a_connection_that_was_refused_ends_though_its_client_reads_on_at_last():
    class Transport(asyncio.Transport):
        aborted = False

        def write(self, data): ...

        def write_eof(self): ...

        def is_closing(self):
            return False

        def abort(self):
            self.aborted = True

    async def ended():
        connection = connections_within(Limits(stuck_seconds=0.01))(
            config=uvicorn.Config(lambda scope, receive, send: None, log_config=None),
            server_state=ServerState(),
            app_state={},
        )
        transport = Transport()
        connection.connection_made(transport)
        connection.pause_writing()
        connection.send_400_response("no HTTP")
        connection.resume_writing()
        await asyncio.sleep(0.05)
        return transport.aborted

    assert asyncio.run(ended())


def test_a_prompt_that_is_read_for_long_gives_comments():
    def script(ticket, tell):
        tell(Reading(5, 20))
        time.sleep(0.5)
        tell(Begun(20, 0))
        tell(Ended(0, "stop", 0))

    with serving(FakeEngine(script), limits=Limits(comment_seconds=0.05)) as served:
        begun = time.monotonic()
        data, comments = events(served.chat(stream=True)[2])
        assert comments[0] == ": 5 of 20 tokens read"
        assert 2 <= len(comments) <= 1 + (time.monotonic() - begun) / 0.05
        assert data[0]["choices"][0]["delta"]["role"] == "assistant"
        assert data[-1] == "[DONE]"


# Errors of the engine.


class Failing(FakeEngine):
    """Raises `error` when a work is submitted, or, `late`, tells it afterwards."""

    error, late = None, False

    def submit(self, work, listener):
        if self.late:
            return super().submit(work, listener)
        raise self.error

    def _run(self, ticket, listener):
        self.script = self._fail
        super()._run(ticket, listener)

    def _fail(self, ticket, tell):
        raise self.error


@pytest.fixture(scope="module")
def failing():
    with serving(Failing()) as served:
        yield served


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("256 requests wait", 2.4), 429, "rate_limit_exceeded"),
        (ContextLengthError("5,000 tokens", 5000, 4096), 400, "context_length_exceeded"),
        (MemoryLimitError("it needs 9 GB, and there are 8 GB"), 400, "memory_limit_exceeded"),
        (PromptError("the prompt is empty"), 400, "invalid_prompt"),
        (ChatError("message 1"), 400, "invalid_messages"),
        (Phi3Error("NaN"), 500, "server_error"),
        (ClosedError("the engine has ended"), 503, "server_closing"),
        (RuntimeError("secret of a prompt"), 500, "server_error"),
    ],
)
def test_errors_of_the_engine_have_a_status_and_a_code_of_their_own(failing, error, status, code, stream, late):
    failing.engine.error, failing.engine.late = error, late
    failing.log.clear()
    given, headers, reply = failing.chat("a prompt", stream=stream)
    assert (given, reply["error"]["code"]) == (status, code)
    assert headers.get("retry-after") == ("3" if status == 429 else None)
    assert not any("prompt" in line or "secret" in line for line in failing.log)
    if isinstance(error, RuntimeError):
        assert "secret" not in reply["error"]["message"]
        assert any("unexpected RuntimeError" in line for line in failing.log)


def test_an_error_in_mid_stream_is_an_event():
    def script(ticket, tell):
        tell(Begun(1, 0))
        tell(Piece(0, "a", ()))
        raise Phi3Error("the logits are NaN")  # at once: what was told before is said before

    with serving(FakeEngine(script)) as served:
        data, _ = events(served.chat(stream=True)[2])
        assert data[1]["choices"][0]["delta"] == {"content": "a"}
        assert data[-1]["error"]["message"] == "the logits are NaN"
        assert "[DONE]" not in data


# What is told of the server itself.


def test_health_asks_the_engine_once_a_second_at_most():
    with serving() as served:
        threads = [threading.Thread(target=served.request, args=("GET", "/health")) for _ in range(8)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(5):
            served.request("GET", "/health")
        assert 1 <= served.engine.probes <= 1 + (time.monotonic() - begun)


def test_health_says_that_the_engine_is_dead():
    engine = FakeEngine()
    engine.is_alive = False
    with serving(engine) as served:
        status, _, reply = served.request("GET", "/health")
        assert (status, reply["error"]["code"]) == (503, "engine_dead")


def test_metrics_are_in_prometheus_form():
    with serving() as served:
        served.chat()
        served.request("GET", "/secret/path")
        _, headers, text = served.request("GET", "/metrics")
        assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'phi3_mlx_requests_total{path="/v1/chat/completions",status="200"} 1\n' in text
        assert 'phi3_mlx_requests_total{path="other",status="404"} 1\n' in text
        assert "phi3_mlx_requests_running 1\n" in text
        assert "memory_limit_bytes" not in text  # there is none
        for line in text.splitlines():
            assert line.startswith(("# HELP phi3_mlx_", "# TYPE phi3_mlx_", "phi3_mlx_"))


def test_the_log_has_a_line_a_request_and_no_word_of_a_prompt():
    with serving() as served:
        served.chat("secret")
        served.chat("secret", temperature="secret")
        served.request("GET", "/v1/models?secret=1")
        wait_until(lambda: len(served.log) == 3)
        assert served.log[0].startswith("POST /v1/chat/completions 200 ")
        assert not any("secret" in line for line in served.log)
    with serving(prompts=True) as served:
        served.chat("secret")
        assert "secret" in served.log[0]


def test_a_path_cannot_write_lines_of_its_own_into_the_log():
    with serving() as served:
        served.request("GET", "/a%0aPOST%20/forged%1b")
        wait_until(lambda: served.log)
        assert len(served.log) == 1
        assert served.log[0].isprintable()


# The end.


def takes_connections(served):
    try:
        socket.create_connection(("127.0.0.1", served.port)).close()
    except OSError:
        return False
    return True


def test_an_answer_that_runs_may_end_when_the_server_stops():
    go_on = threading.Event()

    def script(ticket, tell):
        tell(Begun(1, 0))
        go_on.wait(PATIENCE)
        tell(Piece(0, "the end", ()))
        tell(Ended(0, "stop", 2))

    with serving(FakeEngine(script)) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat_body(stream=True)))
        answer = connection.getresponse()
        served.server.should_exit = True
        wait_until(lambda: not takes_connections(served))
        go_on.set()
        data, _ = events(answer.read().decode())
        assert data[1]["choices"][0]["delta"] == {"content": "the end"}
        assert data[-1] == "[DONE]"
        connection.close()


def test_an_answer_that_does_not_end_is_told_that_the_server_stopped():
    with serving(FakeEngine(silent), limits=Limits(grace_seconds=0.3)) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat_body(stream=True)))
        answer = connection.getresponse()
        served.server.should_exit = True
        data, _ = events(answer.read().decode())
        assert data[-1]["error"]["code"] == "server_closing"
        assert served.engine.tickets[0].cancelled.is_set()
        connection.close()
