"""Server-sent events: an answer on its way, as a stream of lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol

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


class StreamEvent(NamedTuple):
    """A JSON value that a stream says, and the event's name if it has one. A whole reply says none of them."""

    value: Mapping[str, Any]
    name: str | None = None

    @property
    def text(self) -> str:
        """As it goes to the client."""
        head = "" if self.name is None else f"event: {self.name}\n"
        return f"{head}data: {json_line(self.value)}\n\n"


class Reply(Protocol):
    """The answer to one request: it takes what the engine tells, and says it as a stream or as a whole.

    `last_line` ends a stream that has said all.
    """

    last_line: str

    def take(self, number: int, event: Event) -> Iterator[StreamEvent]:
        """What a stream says of an event; `number` is its work's. All of it is to be read, each before the next."""
        ...

    def end(self) -> Iterator[StreamEvent]:
        """What a stream says once all is told."""
        ...

    def failed(self, error: ApiError) -> Iterator[StreamEvent]:
        """What a stream says of an error, in place of the rest."""
        ...

    def whole(self) -> dict[str, Any]:
        """The reply to a client that did not ask for a stream, once all is told."""
        ...


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
                lines = "".join(_texts(self._reply.take(number, event)) for number, event in news)
                await _write(send, lines or (self._comment() if not news else ""))
                if self._exchange.done:
                    break
                news = await self._exchange.news()
            await _write(send, _texts(self._reply.end()) + self._reply.last_line, more=False)
        except ClientGoneError:
            pass
        except Exception as error:
            await _write(send, _texts(self._reply.failed(self._told(error))), more=False)
        finally:
            self._exchange.close()

    def _comment(self) -> str:
        """A line that clients skip, so that nothing between them and here takes the connection for dead."""
        reading = self._exchange.reading
        return ": waiting\n\n" if reading is None else f": {reading.done} of {reading.total} tokens read\n\n"


def _texts(said: Iterator[StreamEvent]) -> str:
    return "".join(event.text for event in said)


async def _write(send: Send, text: str, *, more: bool = True) -> None:
    if text or not more:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
