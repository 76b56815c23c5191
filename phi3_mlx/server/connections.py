"""Connections that cannot be held for nothing: their number, and how long a client may take to ask or to read.

uvicorn has no limit for slow headers, nor for a client that stops reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .faults import ApiError, raw_response
from .limits import Limits

_PARTING = 1.0  # seconds that a client has to read why its connection ends, while what it still sends is thrown away


class Connection(H11Protocol):
    """One client. `limits` are set by `connections_within`."""

    limits: Limits

    def __init__(self, *args: Any, **given: Any):
        super().__init__(*args, **given)
        self._asking = _Timer(self.loop)  # runs until the headers of a request are there
        self._reading = _Timer(self.loop)  # runs while the client takes nothing of what is sent
        self._parting = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        crowded = len(self.connections) >= self.limits.connections
        super().connection_made(transport)
        if crowded:
            headers = {"Retry-After": "1"}
            self._answer(ApiError(503, "too many connections", "too_many_connections", headers=headers))
        else:
            self._asking.start(self.limits.header_seconds, self._asked_too_slowly)

    def data_received(self, data: bytes) -> None:
        if self._parting:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._asking.stop()
        elif not (self._parting or self.transport.is_closing()):
            self._asking.start(self.limits.header_seconds, self._asked_too_slowly)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._give_up_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._give_up_later()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._give_up_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._give_up_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not (self._parting or self.transport.is_closing()):
            self._reading.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._asking.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has longer headers than h11 keeps."""
        self._answer(ApiError(400, "this is no HTTP request, or its headers are too long", "invalid_request"))

    def _asked_too_slowly(self) -> None:
        if self.cycle is None:
            seconds = f"{self.limits.header_seconds:g}"
            self._answer(ApiError(408, f"no request came within {seconds} s", "request_timeout"))
        else:  # this connection was of use before, and its client knows that it may be closed
            self.transport.close()
            self._give_up_later()

    def _answer(self, error: ApiError) -> None:
        """The last answer here. To close while something is unread would break the connection, and the answer, off."""
        self._asking.stop()
        self._parting = True
        self.transport.write(raw_response(error))
        self.transport.write_eof()
        self._reading.start(_PARTING, self.transport.abort)

    def _give_up_later(self) -> None:
        self._reading.start(self.limits.stuck_seconds, self.transport.abort)


class _Timer:
    """Calls something once, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, then: Callable[[], None]) -> None:
        """Begin to count, if it does not yet."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, then)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def connections_within(limits: Limits) -> type[Connection]:
    """The class of connections with these limits, for uvicorn, which makes them."""
    return type("Connection", (Connection,), {"limits": limits})
