"""How much of everything a client may take, and the reading of a body within that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..fields import parse
from ..sizes import size_text
from .faults import CLOSING, ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Python's lock is held while JSON is read, so everybody waits: 0.3 s for a million empty lists.
_MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and counts. A client that exceeds one is answered where it can be, and its connection closed."""

    connections: int = 256
    header_bytes: int = 32 << 10
    header_seconds: float = 10.0  # from a connection, or the first byte of a further request, to the end of its headers
    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    bodies_bytes: int = 128 << 20  # all bodies that are held at a time
    idle_seconds: int = 30  # a connection that is kept for a further request
    stuck_seconds: float = 30.0  # until a client that reads nothing is given up
    unread_bytes: int = 4 << 20  # of an answer that its client has not read yet
    comment_seconds: float = 10.0  # between the comments of a stream that has nothing to say
    answers: int = 128  # of a request, over all its prompts
    grace_seconds: float = 30.0  # that answers have to end once the server is to stop


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is there to be answered."""


class Bodies:
    """Reads the bodies of requests, those that are on their way together within `limits.bodies_bytes`."""

    def __init__(self, limits: Limits):
        self._limits, self._held = limits, 0

    async def read(self, receive: Receive, declared: int | None) -> bytes:
        """A whole body; `declared` is its length, if the client says it.

        Raises ApiError for one that is too large or too slow, ClientGoneError.
        """
        if declared is not None and declared > self._limits.body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self._limits.body_seconds:g}"
            message = f"the body did not come within {seconds} s"
            raise ApiError(408, message, "request_timeout", headers=CLOSING) from None

    async def _read(self, receive: Receive) -> bytes:
        data = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                more = message.get("body", b"")
                self._held += len(more)
                data += more
                if len(data) > self._limits.body_bytes:
                    raise self._too_large()
                if self._held > self._limits.bodies_bytes:
                    headers = {**CLOSING, "Retry-After": "1"}
                    raise ApiError(429, "too many large requests at a time", "rate_limit_exceeded", headers=headers)
                if not message.get("more_body", False):
                    return bytes(data)
        finally:
            self._held -= len(data)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {size_text(self._limits.body_bytes)}"
        return ApiError(413, message, "request_too_large", headers=CLOSING)


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a body holds. ApiError for what is none, nested too deep, or may have too many values."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:  # some may stand in texts
        message = f"the body has more than {_MOST_VALUES:,} commas and brackets"
        raise ApiError(413, message, "request_too_large")
    try:
        value = parse(data.decode(), strict=True)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object", "invalid_json")
    return value
