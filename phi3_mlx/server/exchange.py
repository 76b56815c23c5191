"""What the engine tells of a request, from its thread to the event loop, no further than the client reads.

The engine never waits for a client. What the client has not taken yet is kept here, up to `Limits.unread_bytes`; a
client that falls further behind loses its request, and the engine is free for the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from .faults import ApiError
from .limits import ClientGoneError, Limits, Receive
from .work import Ended, Event, EventListener, Failed, Figures, Piece, Reading, Work

_EVENT_BYTES, _TOKEN_BYTES = 100, 150  # what an event takes beside its text, and a token or an alternative


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Engine(Protocol):
    """What runs works: `worker.Worker`."""

    def submit(self, work: Work, listener: EventListener) -> Cancellable: ...

    def alive(self, within: float = ...) -> bool: ...

    def figures(self) -> Figures: ...


class Mailbox:
    """Brings what the engine's thread tells to the event loop in which it was made.

    What comes before the loop has looked wakes it once: each time costs a system call, in which the engine loses
    Python's lock to the loop and may wait for it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def put(self, call: Callable[[], None]) -> None:
        """From any thread: let the loop make this call. RuntimeError if it is closed."""
        self._calls.append(call)
        if not self._woken:
            self._woken = True  # before, as the loop may look at once
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self) -> None:
        self._woken = False  # before, so that what comes meanwhile is either seen here or wakes again
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception as error:  # of one request: what others are told must not wait behind it
                told = {"message": "a listener of the engine failed", "exception": error}
                self._loop.call_exception_handler(told)


class Exchange:
    """The works of one request, and what is told of them, in order. Made, read and closed in the event loop.

    The engine tells by way of `mailbox`. `on_close` is called with it once it is closed.
    """

    def __init__(self, limits: Limits, mailbox: Mailbox, on_close: Callable[[Exchange], None]):
        self._limits, self._mailbox, self._on_close = limits, mailbox, on_close
        self._tickets: list[Cancellable] = []
        self._told: deque[tuple[int, Event]] = deque()
        self._news = asyncio.Event()
        self._unread = self._open = 0
        self._error: Exception | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self.reading: Reading | None = None  # how far the prompt is read

    def submit(self, engine: Engine, works: Sequence[Work]) -> None:
        """Hand the works to the engine, all or none; from any thread, as encoding a long prompt takes a while."""
        self._open = sum(max(work.n, 1) for work in works)  # times that an end is told
        try:
            for number, work in enumerate(works):
                self._tickets.append(engine.submit(work, partial(self._listen, number)))
        except BaseException:
            self._closed = True
            raise
        finally:
            if self._closed:  # the client has gone meanwhile
                self._cancel()

    def watch(self, receive: Receive) -> None:
        """From now on the works end when the client goes."""
        self._watching = asyncio.create_task(self._watch(receive))

    def fail(self, error: Exception) -> None:
        """End the works with an error that the client is told."""
        if self._error is None:
            self._error = error
            self._cancel()
            self._news.set()

    def close(self) -> None:
        """End what still runs."""
        self._closed = True
        self._cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._on_close(self)

    async def news(self) -> list[tuple[int, Event]]:
        """What was told since the last call, with the number of its work; nothing after `comment_seconds` without any.

        Once that is taken, raises what a work failed with, ClientGoneError, or ApiError for a client too slow.
        """
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), self._limits.comment_seconds)
        news, self._unread = [*self._told], 0
        self._told.clear()
        if self._error is None:
            self._news.clear()
        elif not news:
            raise self._error
        return news

    @property
    def done(self) -> bool:
        """Whether all was told, and taken."""
        return not self._open and not self._told

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while not self.done:
            for item in await self.news():
                yield item

    def _listen(self, number: int, event: Event) -> None:
        """In the engine's thread."""
        self._mailbox.put(partial(self._take, number, event))

    def _take(self, number: int, event: Event) -> None:
        if self._closed or self._error is not None:
            return
        if isinstance(event, Failed):
            self.fail(event.error)
            return
        if isinstance(event, Reading):
            self.reading = event
            return
        self._open -= isinstance(event, Ended)
        self._told.append((number, event))
        self._unread += _size(event)
        if self._unread > self._limits.unread_bytes:
            self.fail(ApiError(429, "the answer was not read as fast as it was made", "client_too_slow"))
        self._news.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientGoneError())

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()


def _size(event: Event) -> int:
    if not isinstance(event, Piece):
        return _EVENT_BYTES
    told = sum(1 + len(token.top) for token in event.tokens)
    return _EVENT_BYTES + len(event.text) + _TOKEN_BYTES * told
