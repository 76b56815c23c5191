"""The requests that are being answered, and what they share: the engine, the limits, the log."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse

from ..engine.plan import Plan
from ..errors import ModelNotFoundError, Phi3Error
from .asked import Asked, Defaults
from .exchange import Engine, Exchange, Mailbox
from .faults import CLOSING, ApiError, api_error
from .limits import Bodies
from .metrics import Requests
from .streams import EventStream
from .work import ModelCard

Made = TypeVar("Made")
Plans = Callable[[str, int | None], tuple[int, Mapping[int, Plan]]]  # of a name: what may be used, and plans by length
_PROBE_SECONDS, _ALIVE_WITHIN = 1.0, 5.0


def no_plans(name: str, tokens: int | None) -> NoReturn:
    raise ModelNotFoundError("this server plans no memory")


class Service:
    """The requests that are being answered.

    `plans` gives the memory plans of a model by length. `log` gets a line a request, and with `prompts` what it
    says; without, no word of it.
    """

    def __init__(
        self,
        engine: Engine,
        listed: Callable[[], Sequence[ModelCard]],
        defaults: Defaults,
        log: Callable[[str], None],
        *,
        prompts: bool = False,
        plans: Plans = no_plans,
    ):
        self.engine, self.listed, self.defaults, self.log = engine, listed, defaults, log
        self.plans = plans
        self.limits, self.requests = defaults.limits, Requests()
        self._prompts, self._bodies = prompts, Bodies(self.limits)
        self._exchanges: set[Exchange] = set()
        self._mailbox: Mailbox | None = None  # of the loop that runs this
        # Prompts are encoded and schemas are checked beside the event loop.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="phi3-mlx-request")
        self._stopping: ApiError | None = None
        self._probed, self._alive = 0.0, True
        self._probing: asyncio.Task[bool] | None = None

    async def body(self, request: HTTPRequest) -> bytes:
        """What a request brings."""
        if self._stopping is not None:
            raise self._stopping
        length = request.headers.get("content-length", "")
        return await self._bodies.read(request.receive, int(length) if length.isdigit() else None)

    async def beside(self, function: Callable[..., Made], *arguments: Any) -> Made:
        """What a function gives that may take a while."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def answer(self, request: HTTPRequest, asked: Asked) -> JSONResponse | EventStream:
        """The response to a request: what the engine tells of it, as its reply says it."""
        if self._mailbox is None:
            self._mailbox = Mailbox()
        exchange, reply = Exchange(self.limits, self._mailbox, self._exchanges.discard), asked.reply
        self._exchanges.add(exchange)
        try:
            await self.beside(exchange.submit, self.engine, asked.works)
            exchange.watch(request.receive)
            if asked.streamed:
                # A fault that is known by now still has a status of its own.
                return EventStream(exchange, reply, await exchange.news(), self.told)
            async for number, event in exchange:
                for _ in reply.take(number, event):
                    pass
        except BaseException:
            exchange.close()
            raise
        exchange.close()
        return JSONResponse(reply.whole())

    def told(self, error: Exception) -> ApiError:
        """An error as its client is told it; of one that nobody foresaw the log has the place."""
        if not isinstance(error, Phi3Error):
            frames = traceback.extract_tb(error.__traceback__)
            places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
            self.log(f"unexpected {type(error).__name__} at {places}")  # its message may quote a prompt
        return api_error(error)

    def log_prompt(self, body: Mapping[str, Any]) -> None:
        if self._prompts:
            self.log(json.dumps(body, ensure_ascii=False))

    async def alive(self) -> bool:
        """Whether the engine's thread takes steps; asked once a second at most, whoever asks."""
        if self._probing is None and time.monotonic() - self._probed >= _PROBE_SECONDS:
            self._probing = asyncio.create_task(self._probe())
        return self._alive if self._probing is None else await asyncio.shield(self._probing)

    async def _probe(self) -> bool:
        try:
            self._alive = await asyncio.to_thread(self.engine.alive, _ALIVE_WITHIN)
        finally:
            self._probed, self._probing = time.monotonic(), None
        return self._alive

    def stop(self) -> None:
        """Refuse new requests; those that run go on."""
        headers = {**CLOSING, "Retry-After": "5"}
        self._stopping = ApiError(503, "the server is stopping", "server_closing", headers=headers)

    def end(self) -> None:
        """End the requests that still run, with an error that says so."""
        for exchange in [*self._exchanges]:
            exchange.fail(ApiError(503, "the server stopped before the answer ended", "server_closing"))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
