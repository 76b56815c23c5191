"""The server beside mlx-lm's: requests a second, the first token's time, memory, and what each does with bad input.

    python -m bench serve [--only CASE] [--clients N ...] [--requests N] [--answer N ...] [--shared N] [--runs N]

Both servers run on the same directory, as processes of their own, and are asked in turn. Clients of one machine ask at
once, each its share of the requests, over HTTP: questions that no other asked, under one long system message. Answers
are streamed and have `--answer` tokens. Models have random weights of a middling shape, not packed, in 4 bits with
float32 scales and with bfloat16 scales; with these, which mlx-lm reads at a few tokens a second on a CPU, the system
message is an eighth as long, and each client asks once. The last table sends both servers, once each, what a client may
get wrong.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from phi3_mlx import load_tokenizer, resolve

from . import record
from .models import DTYPE, MIDDLING, copy_tokenizer, make_checkpoint, text_of


class Case(NamedTuple):
    """The type of the scales, the bits of the weights, what it is called, and by how much the system is shorter."""

    dtype: str
    bits: int
    name: str
    shorter: int = 1


CASES = {
    "floats": Case(DTYPE, 0, DTYPE),
    "float32": Case("float32", 4, "4-bit, float32 scales"),
    "bfloat16": Case("bfloat16", 4, "4-bit, bfloat16 scales", 1 if record.on_gpu() else 8),
}
COMMANDS = {
    "phi3-mlx": ("-m", "phi3_mlx", "serve", "--model"),
    "mlx-lm": ("-m", "mlx_lm", "server", "--model"),
}
READY, PATIENCE = 120, 900  # seconds that a server may take to start, and to answer
BROKEN = 100  # times that a request may be broken off before it is answered


@dataclass(frozen=True)
class Server:
    """A server that runs: its port, its process, and the name it calls its model."""

    port: int
    process: subprocess.Popen[bytes]
    model: str

    def send(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """A request's status and what came back; 0 where the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error).encode()
        finally:
            connection.close()

    def wait(self, package: str) -> None:
        """Until it answers."""
        began = time.perf_counter()
        while time.perf_counter() - began < READY and self.process.poll() is None:
            if self.send("GET", "/v1/models")[0] == 200:
                return
            time.sleep(0.1)
        raise click.ClickException(f"{package}'s server did not start")

    def stream(self, **fields: Any) -> dict[str, float]:
        """A streamed chat: seconds until its first text and until its end, and the tokens that its usage tells."""
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **fields}
        started, first = time.perf_counter(), 0.0
        usage: dict[str, int] = {}
        connection, response, broken = self._begin(json.dumps(body).encode())
        if response.status != 200:
            raise click.ClickException(f"HTTP {response.status}: {response.read()[:500].decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            usage = chunk.get("usage") or usage
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = first or time.perf_counter() - started
        connection.close()
        return {"first": first, "tokens": usage["completion_tokens"], "broken": broken}

    def _begin(self, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, int]:
        """A request's connection and response, and how often it was broken off before: where it is, it is tried again.

        mlx-lm's server lets five connections wait, and the system breaks off what comes beside them.
        """
        for broken in range(BROKEN):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            try:
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                return connection, connection.getresponse(), broken
            except ConnectionError:
                connection.close()
                time.sleep(0.05)
        raise click.ClickException(f"a request was broken off {BROKEN} times")

    @property
    def processor_seconds(self) -> float | None:
        """What the process has taken of all cores, where the system tells."""
        status = Path(f"/proc/{self.process.pid}/stat")
        if not status.is_file():
            return None
        fields = status.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that the process has had in memory, where the system tells."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.is_file():
            return None
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


@contextmanager
def running(package: str, directory: Path) -> Iterator[Server]:
    """The package's server of the model in a directory, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name = f"./{directory.name}"  # told in answers, which are to be the same every time
    command = [sys.executable, *COMMANDS[package], name, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=record.offline(), cwd=directory.parent, stdout=log, stderr=log)
        try:
            server = Server(port, process, name)
            server.wait(package)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def asked(server: Server, system: str, clients: int, requests: int, answer: int, first: int) -> dict[str, float]:
    """So many requests by clients at once; question `first` is the first that no other asked."""
    answers: list[dict[str, float]] = []
    numbers = iter(range(first, first + requests))
    taking, failed = threading.Lock(), list[BaseException]()

    def ask() -> None:
        try:
            while not failed:
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}?"}]
                answers.append(server.stream(messages=messages, max_tokens=answer, temperature=0))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    started, worked = time.perf_counter(), server.processor_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, ended = time.perf_counter() - started, server.processor_seconds
    if failed:
        raise failed[0]
    firsts = sorted(each["first"] for each in answers)
    figures = {
        "requests_per_second": requests / seconds,
        "tokens_per_second": sum(each["tokens"] for each in answers) / seconds,
        "first_token": firsts[len(firsts) // 2],
        "last_first_token": firsts[-1],
        "broken": sum(each["broken"] for each in answers),
    }
    if worked is not None and ended is not None:
        figures["processor_seconds_per_request"] = (ended - worked) / requests
    return figures


# What a client may get wrong, and what it may ask for that is not there: path and body of each.
_HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}
BAD: dict[str, tuple[str, str, Any]] = {
    "not JSON": ("POST", "/v1/chat/completions", b'{"messages": ['),
    "JSON, 20,000 lists deep": ("POST", "/v1/chat/completions", b"[" * 20_000),
    "a path that is not there": ("POST", "/v1/nothing", _HELLO),
    "a method that the path has not": ("PUT", "/v1/chat/completions", _HELLO),
    "no messages": ("POST", "/v1/chat/completions", {"max_tokens": 8}),
    "`content: null` of a user": (
        "POST",
        "/v1/chat/completions",
        {**_HELLO, "messages": [{"role": "user", "content": None}]},
    ),
    "an unknown role": (
        "POST",
        "/v1/chat/completions",
        {**_HELLO, "messages": [{"role": "robot", "content": "Hello"}]},
    ),
    '`temperature: "hot"`': ("POST", "/v1/chat/completions", {**_HELLO, "temperature": "hot"}),
    "`max_tokens: -1`": ("POST", "/v1/chat/completions", {**_HELLO, "max_tokens": -1}),
    "a field that nobody knows": ("POST", "/v1/chat/completions", {**_HELLO, "temprature": 0.7}),
    '`reasoning_effort: "high"`': ("POST", "/v1/chat/completions", {**_HELLO, "reasoning_effort": "high"}),
    "`response_format` with a JSON schema": (
        "POST",
        "/v1/chat/completions",
        {**_HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}},
    ),
    "a picture": (
        "POST",
        "/v1/chat/completions",
        {
            **_HELLO,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        },
    ),
    "a model that is not there": ("POST", "/v1/chat/completions", {**_HELLO, "model": "gpt-5"}),
    "a prompt longer than the context": (
        "POST",
        "/v1/chat/completions",
        {**_HELLO, "messages": [{"role": "user", "content": "a b c d e f g h " * 2_500}]},
    ),
}


def bad_inputs(server: Server) -> list[dict[str, Any]]:
    """What the server does with each, and whether it lives after it."""
    rows = []
    for name, (method, path, body) in BAD.items():
        named = body if isinstance(body, bytes) else json.dumps({"model": server.model, **body}).encode()
        status, told = server.send(method, path, named)
        lives = server.send("POST", "/v1/chat/completions", json.dumps({**_HELLO, "model": server.model}).encode())[0]
        rows.append({"input": name, "status": status, "told": _told(status, told), "lives": lives == 200})
    return rows


def _told(status: int, body: bytes) -> str:
    """The message of an error, or the answer's text, in a line."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text)
        if "error" in content:
            error = content["error"]
            text = error["message"] if isinstance(error, dict) else str(error)
        elif status == 200:
            text = content["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:119]}…"


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="Some cases (repeatable).")
@click.option("--clients", multiple=True, type=int, default=(1, 4, 16), show_default=True, help="At once (repeatable).")
@click.option("--requests", default=8, show_default=True, help="Of all clients; one of each at least.")
@click.option(
    "--answer", "answers", multiple=True, type=int, default=(16,), show_default=True, help="Tokens (repeatable)."
)
@click.option("--shared", default=1024, show_default=True, help="Tokens of the system message.")
@click.option("--layers", default=4, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(
    only: tuple[str, ...],
    clients: tuple[int, ...],
    requests: int,
    answers: tuple[int, ...],
    shared: int,
    layers: int,
    runs: int,
) -> None:
    rows: list[dict[str, Any]] = []
    bad: dict[str, list[dict[str, Any]]] = {}
    tokenizer = load_tokenizer(resolve("tiny"))
    for name in only or CASES:
        case = CASES[name]
        system = text_of(tokenizer, shared // case.shorter)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, "model")
            shape = {**MIDDLING, "vocab_size": 4032, "eos_token_id": 4031}
            make_checkpoint(directory, layers, case.dtype, case.bits, **shape)
            copy_tokenizer(directory)
            with ExitStack() as stack:
                servers = {package: stack.enter_context(running(package, directory)) for package in COMMANDS}
                for server in servers.values():
                    asked(server, system, 1, 2, answers[0], 0)  # warms up
                for number, (answer, count) in enumerate(itertools.product(answers, clients)):
                    measured: dict[str, list[dict[str, float]]] = {package: [] for package in servers}
                    for run, (package, server) in itertools.product(range(1, runs + 1), servers.items()):
                        first = 1_000_000 * run + 1_000 * number
                        total = count if case.shorter > 1 else max(requests, count)
                        measured[package].append(asked(server, system, count, total, answer, first))
                    for package, figures in measured.items():
                        spreads = {key: record.spread([run[key] for run in figures]) for key in figures[0]}
                        row = {"case": name, "model": case.name, "package": package, "clients": count}
                        row |= {"answer": answer, "shared": shared // case.shorter, **spreads}
                        rows.append({**row, "peak_memory": servers[package].peak_memory})
                        _tell(rows[-1])
                if not bad:
                    bad = {package: bad_inputs(server) for package, server in servers.items()}
    record.write("serve", rows, "mlx", "mlx-lm", requests=requests, layers=layers, bad=bad)
    for package, told in bad.items():
        for one in told:
            click.echo(f"{package:9} {one['input']:38} {one['status']} {'' if one['lives'] else 'DEAD '}{one['told']}")


def _tell(row: dict[str, Any]) -> None:
    click.echo(
        f"{row['case']:9} {row['package']:9} {row['clients']:2} clients  {row['answer']:3} tokens  "
        f"{row['requests_per_second']['median']:7.2f} requests/s  {row['tokens_per_second']['median']:8.1f} tok/s  "
        f"first token {row['first_token']['median']:.3f} s, the last {row['last_first_token']['median']:.3f} s"
    )


if __name__ == "__main__":
    main()
