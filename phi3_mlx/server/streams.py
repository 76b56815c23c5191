"""Server-sent events: an answer on its way, as a stream of lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Protocol

from .exchange import Exchange
from .faults import ApiError
from .guard import Send
from .limits import ClientGoneError, Receive
from .work import Event

DONE = "data: [DONE]\n\n"
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would keep it until the end
}


class Reply(Protocol):
    """The answer to one request: it takes what the engine tells, and says it as a stream or as a whole."""

    def take(self, number: int, event: Event) -> Iterator[str]:
        """What a stream says of an event; `number` is its work's. All of it is to be read."""
        ...

    def end(self) -> Iterator[str]:
        """What a stream says once all is told."""
        ...

    def failed(self, error: ApiError) -> Iterator[str]:
        """What a stream says of an error, in place of the rest."""
        ...

    def whole(self) -> dict[str, Any]:
        """The reply to a client that did not ask for a stream, once all is told."""
        ...


def data(value: Any) -> str:
    """An event of a stream, without a name."""
    return f"data: {json_line(value)}\n\n"


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class EventStream:
    """The response whose body says what is told, as it is told.

    `news` is what was told before it began, `told` makes the error of an exception that ends it early.
    """

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        news: list[tuple[int, Event]],
        told: Callable[[Exception], ApiError],
    ):
        self._exchange, self._reply, self._first, self._told = exchange, reply, news, told

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            news = self._first
            while True:
                lines = "".join(line for number, event in news for line in self._reply.take(number, event))
                await _write(send, lines or (self._comment() if not news else ""))
                if self._exchange.done:
                    break
                news = await self._exchange.news()
            await _write(send, "".join(self._reply.end()), more=False)
        except ClientGoneError:
            pass
        except Exception as error:
            await _write(send, "".join(self._reply.failed(self._told(error))), more=False)
        finally:
            self._exchange.close()

    def _comment(self) -> str:
        """A line that clients skip, so that nothing between them and here takes the connection for dead."""
        reading = self._exchange.reading
        return ": waiting\n\n" if reading is None else f": {reading.done} of {reading.total} tokens read\n\n"


async def _write(send: Send, text: str, *, more: bool = True) -> None:
    if text or not more:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
