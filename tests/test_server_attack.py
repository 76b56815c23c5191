"""What strangers may send to a real `phi3-mlx serve` process: it refuses in OpenAI's form or answers, and lives."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from conftest import ROOT
from served import wait_until

HEAD = "Host: localhost\r\nConnection: close\r\n"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@contextlib.contextmanager
def a_server(*options):
    """The port of a process that serves the bundled model, and the process; what it says must be no traceback."""
    command = [sys.executable, "-m", "phi3_mlx", "serve", "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = [process.stderr.readline()]
        reading = threading.Thread(target=lambda: said.extend(process.stderr))
        reading.start()
        try:
            yield int(re.search(r":(\d+)/v1", said[0])[1]), process
        finally:
            process.kill()
            reading.join()
    assert not [line for line in said if "Traceback" in line or "unexpected" in line]


@pytest.fixture(scope="module")
def port():
    with a_server() as (port, _):
        yield port


def send(port, data, *, half=False, seconds=60):
    """What comes back until the server closes the connection; b"" where it is broken off."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection, contextlib.suppress(OSError):
        received = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        if half:
            connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(65536):
            received += more
        return received
    return b""


def posted(body, path="/v1/chat/completions", more=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\n{HEAD}{more}Content-Length: {len(data)}\r\n\r\n".encode() + data


def headed(line, more="", body=b""):
    return f"{line}\r\n{HEAD}{more}\r\n".encode("latin-1") + body


CHUNKED = "Transfer-Encoding: chunked\r\n"
POST = "POST /v1/chat/completions HTTP/1.1"
EACH_BYTE = b"".join(b"1\r\n%c\r\n" % byte for byte in json.dumps(HELLO).encode()) + b"0\r\n\r\n"
ATTACKS = {
    "no HTTP": (b"\x00\xff hello\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "two hosts": (headed("GET /v1/models HTTP/1.1", "Host: other\r\n"), 400),
    "NUL in a path": (headed("GET /v1/mod\0els HTTP/1.1"), 400),
    "a path that climbs": (headed("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), 404),
    "a name with line ends": (headed("GET /v1/models/%0d%0a%00%ff HTTP/1.1"), 404),
    "a long path": (headed("GET /" + "a" * 30_000 + " HTTP/1.1"), 404),
    "CONNECT": (headed("CONNECT other:443 HTTP/1.1"), 404),
    "OPTIONS *": (headed("OPTIONS * HTTP/1.1"), 404),
    "a huge header": (headed("GET /v1/models HTTP/1.1", f"X: {'a' * 200_000}\r\n"), 400),
    "a length below 0": (headed(POST, "Content-Length: -5\r\n"), 400),
    "a length beyond all": (headed(POST, "Content-Length: 99999999999999999999\r\n"), 413),
    "two lengths": (headed(POST, "Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"), 400),
    "an odd digit as length": (headed(POST, "Content-Length: \xb2\r\n"), 400),
    "another coding": (headed(POST, "Transfer-Encoding: gzip\r\n"), 400),
    "a length beside chunks": (headed(POST, f"Content-Length: 5\r\n{CHUNKED}", b"0\r\n\r\n"), 400),
    "a chunk of no length": (headed(POST, CHUNKED, b"zz\r\nhello\r\n"), 400),
    "a chunk of length below 0": (headed(POST, CHUNKED, b"-1\r\nhello\r\n"), 400),
    "a chunk a byte": (headed(POST, CHUNKED, EACH_BYTE), 200),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "a WebSocket": (headed("GET /v1/models HTTP/1.1", "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"), 200),
    "a zipped body": (posted(b"\x1f\x8b" + bytes(30), more="Content-Encoding: gzip\r\n"), 400),
    "lists, 100,000 deep": (posted(b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 400),
    "objects, 50,000 deep": (posted(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), 400),
    "a number of 100,000 digits": (posted(b'{"seed":' + b"9" * 100_000 + b"}"), 400),
    "NaN": (posted(b'{"temperature":NaN}'), 400),
    "a key twice": (posted(b'{"model":"tiny","model":"other"}'), 400),
    "half a character": (posted(b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}'), 400),
    "NUL in a message": (posted({**HELLO, "messages": [{"role": "user", "content": "a\0b"}]}), 200),
    "UTF-16": (posted(json.dumps(HELLO).encode("utf-16")), 400),
    "nothing": (posted(b""), 400),
    "a list": (posted(b"[]"), 400),
    "20,000 keys": (posted({**HELLO, **{f"key{n}": 1 for n in range(20_000)}}), 400),
    "20,000 messages": (posted({**HELLO, "messages": HELLO["messages"] * 20_000}), 400),
    "a text of 8 MB": (posted({**HELLO, "messages": [{"role": "user", "content": "a" * 8_000_000}]}), 400),
    "ids that are none": (posted({"model": "tiny", "prompt": [10**9]}, "/v1/completions"), 400),
    "a regex that none fits": (posted({**HELLO, "regex": r"[^\s\S]"}), 400),
    "a grammar that never ends": (posted({**HELLO, "grammar": "start: start"}), 400),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_no_client_should_send_is_refused_or_answered(port, name):
    data, status = ATTACKS[name]
    received = send(port, data)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    if status != 200:
        error = json.loads(body.partition(b"HTTP/1.1 ")[0])["error"]
        assert {"message", "type", "param", "code"} == {*error}
        assert len(error["message"]) < 500
    assert send(port, posted(HELLO)).startswith(b"HTTP/1.1 200 ")


def test_requests_one_behind_the_other_are_each_answered_and_rubbish_ends_them(port):
    one = posted(HELLO).replace(b"Connection: close\r\n", b"")
    assert send(port, one * 3 + posted(HELLO)).count(b"HTTP/1.1 200 ") == 4
    received = send(port, one + b"rubbish\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1 400 ") == 1


def test_a_body_that_ends_early_is_no_request(port):
    assert send(port, posted(HELLO)[:-9], half=True) == b""


def figure(port, name):
    text = send(port, headed("GET /metrics HTTP/1.1")).decode()
    return int(re.search(rf"^phi3_mlx_{name} (\d+)$", text, re.MULTILINE)[1])


def vanish(port, phase, reset):
    """Send as much of a request as the phase says, and go."""
    data = posted({**HELLO, "messages": [{"role": "user", "content": "Mia has a boat. " * 50}], "stream": True})
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall({"connected": b"", "headers": data[:40], "body": data[:-20]}.get(phase, data))
        if phase == "answer":
            connection.recv(100)
        if reset:  # with a RST in place of a FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def together(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_clients_that_vanish_in_any_phase_leave_nothing_behind(port):
    phases = ("connected", "headers", "body", "sent", "answer")
    together(
        lambda phase=phase, reset=reset: vanish(port, phase, reset)
        for phase in phases
        for reset in (False, True)
        for _ in range(4)
    )
    wait_until(lambda: figure(port, "requests_running") == figure(port, "requests_waiting") == 0)
    assert send(port, posted(HELLO)).startswith(b"HTTP/1.1 200 ")


def test_200_connections_at_once_are_all_answered(port):
    received = []
    together([lambda: received.append(send(port, posted(HELLO)))] * 200)
    assert [answer[:13] for answer in received] == [b"HTTP/1.1 200 "] * 200


def test_two_servers_share_a_directory_of_prefixes_and_one_is_killed(tmp_path):
    text = "Mia has a red boat. " * 40
    question = posted({**HELLO, "messages": [{"role": "user", "content": f"{text} Who is she?"}]})

    def answer(port):
        return json.loads(send(port, question).partition(b"\r\n\r\n")[2])

    with a_server("--prefixes", str(tmp_path)) as (port, process), a_server("--prefixes", str(tmp_path)) as (other, _):
        said = answer(port)["choices"][0]["message"]["content"]
        wait_until(lambda: [*tmp_path.glob("*.cache")])
        for number in range(4):  # while files are written
            body = {**HELLO, "messages": [{"role": "user", "content": f"{number} {text}"}], "stream": True}
            threading.Thread(target=send, args=(port, posted(body))).start()
        process.kill()
        found = answer(other)
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
        assert found["choices"][0]["message"]["content"] == said
    with a_server("--prefixes", str(tmp_path)) as (port, _):
        assert answer(port)["choices"][0]["message"]["content"] == said
