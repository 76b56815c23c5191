"""A server on a free port of the loopback address, in a thread, with an engine that needs no model."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn.server

from phi3_mlx.errors import ModelNotFoundError
from phi3_mlx.generation.request import Request
from phi3_mlx.server.app import create_app
from phi3_mlx.server.asked import Defaults
from phi3_mlx.server.limits import Limits
from phi3_mlx.server.running import HttpServer, listen
from phi3_mlx.server.service import Service, no_plans
from phi3_mlx.server.work import Alternative, Begun, Ended, Failed, Figures, ModelCard, Piece, Reading, TokenInfo

CARD = ModelCard("echo", 1_700_000_000, 4096, "says what it is told")
USUAL = Limits()
PATIENCE = 300  # seconds, more than anything here takes on a machine that is very busy


class Impatient:
    """asyncio for uvicorn, which looks ten times a second whether it is to end: tests wait for it each time."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds):
        await asyncio.sleep(seconds / 10)


uvicorn.server.asyncio = Impatient()


class Ticket:
    def __init__(self, work):
        self.work, self.cancelled = work, threading.Event()

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Answers with the words of the last message, one a piece; `script` may say something else.

    `script(engine, work, tell)` runs in a thread of its own for each work.
    """

    def __init__(self, script=None):
        self.script = script or say_words
        self.tickets = []
        self.is_alive = True
        self.probes = 0

    def submit(self, work, listener):
        if work.model != CARD.name:
            raise ModelNotFoundError(f"there is no model {work.model}")
        ticket = Ticket(work)
        self.tickets.append(ticket)
        threading.Thread(target=self._run, args=(ticket, listener), daemon=True).start()
        return ticket

    def _run(self, ticket, listener):
        def tell(event):
            if not ticket.cancelled.is_set():
                with contextlib.suppress(RuntimeError):  # the server has ended
                    listener(event)

        try:
            self.script(ticket, tell)
        except Exception as error:
            tell(Failed(error))

    def listed(self):
        return [CARD]

    def alive(self, within=5.0):
        self.probes += 1
        return self.is_alive

    def figures(self):
        return Figures(1, 2, 30, 4, 5, 6, None, 7, ("echo",))


def text_of(work):
    prompt = work.prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"] if isinstance(prompt[0], dict) else str(prompt)


def token(text, offset, scored=True):
    top = (Alternative(7, text.encode(), -0.5), Alternative(8, b"other", -1.5))
    return TokenInfo(7, text.encode(), offset, -0.5 if scored else None, top if scored else ())


def say_words(ticket, tell):
    work = ticket.work
    words = [f"{word} " for word in text_of(work).split()]
    scored = work.top_logprobs is not None
    echo = tuple(token(word, 0, scored and n > 0) for n, word in enumerate(words)) if work.echo else ()
    tell(Reading(1, len(words)))
    tell(Begun(len(words), 0, echo, text_of(work) if work.echo else ""))
    for index in range(work.n):
        said = words[: work.request.max_tokens]
        offset = 0
        for word in said:
            tell(Piece(index, word, (token(word, offset, scored),)))
            offset += len(word)
        tell(Ended(index, "length" if len(said) < len(words) else "stop", len(said)))


class Served:
    """What a test asks: `request` gives status, headers and the JSON or text of the body."""

    def __init__(self, port, engine, service, server, log):
        self.port, self.engine, self.service, self.server, self.log = port, engine, service, server, log
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method, path, body=None, headers=(), raw=None, seconds=PATIENCE):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            data = raw if raw is not None else None if body is None else json.dumps(body)
            connection.request(method, path, data, dict(headers))
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers.get("content-type", "")
            return answer.status, answer.headers, json.loads(text) if kind == "application/json" else text

    def chat(self, text="one two three", **fields):
        return self.request("POST", "/v1/chat/completions", chat_body(text, **fields))


def chat_body(text="one two three", **fields):
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def events(text):
    """The values of a stream's data lines, and its comments."""
    lines = [line for line in text.split("\n") if line]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in data], [x for x in lines if x.startswith(":")]


def raw(served, data=b"", seconds=PATIENCE):
    """A connection on which `data` was sent."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=seconds)
    connection.sendall(data)
    return connection


def all_of(connection):
    """What a connection brings until it ends."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def error_in(answer):
    """The status and code of an error that stands in a whole HTTP response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@contextlib.contextmanager
def serving(
    engine=None,
    *,
    limits=USUAL,
    base=None,
    longrope="auto",
    others=(),
    prompts=False,
    listed=None,
    plans=no_plans,
    **guard,
):
    """A server that runs while the block does."""
    engine = engine or FakeEngine()
    log = []
    defaults = Defaults(base or Request(), longrope, limits, others)
    service = Service(engine, listed or engine.listed, defaults, log.append, prompts=prompts, plans=plans)
    app = create_app(service, **guard)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = HttpServer(app, service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(port, engine, service, server, log)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.close()
        listening.close()
        assert not thread.is_alive(), "the server did not end"


def wait_until(true, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)
