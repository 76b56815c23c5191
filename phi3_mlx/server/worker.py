"""The thread that runs all models: it takes requests, steps their schedulers in turn, and tells what comes of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import mlx.core as mx

from ..engine import machine
from ..engine.plan import check_length
from ..engine.rows import Row
from ..engine.scheduler import Scheduler
from ..errors import ClosedError, QueueFullError
from .models import Loaded, Models
from .prompts import check_size
from .ticket import Ticket
from .work import EventListener, Figures, Work

_BUFFERS = 1 << 30  # bytes that MLX may keep for reuse, or a sixteenth of the limit where that is less
_RETRY_SECONDS = (1.0, 60.0)  # the least and the most that a client is asked to wait


@dataclass(frozen=True)
class _Part:
    """A row of a scheduler, and the answer that it makes, one of a request's."""

    row: Row
    ticket: Ticket
    index: int


class Worker:
    """Answers requests of several models in one thread, which it starts.

    `queue`: how many requests may wait. Those of one model are answered together, and the models take a step in turn.
    Each answer is what `generate` gives, whatever else runs.
    """

    def __init__(self, models: Models, *, queue: int = 256):
        self._models, self._queue = models, queue
        self._messages: SimpleQueue[Callable[[], object]] = SimpleQueue()  # to be done in the thread
        self._taking = threading.Lock()
        self._tickets: list[Ticket] = []  # all that are not over, oldest first; changed with the lock
        self._closed: ClosedError | None = None
        # Of the thread alone:
        self._ending = False
        self._waiting: deque[Ticket] = deque()  # those that no scheduler has
        self._parts: dict[tuple[Scheduler, int], _Part] = {}  # by the row's index
        self._read_tokens = self._reused_tokens = self._made_tokens = self._prefix_memory = 0
        self._interval, self._last_end = _RETRY_SECONDS[0], time.monotonic()
        self._loaded: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, name="phi3-mlx engine", daemon=True)
        self._thread.start()

    # For any thread.

    def submit(self, work: Work, listener: EventListener) -> Ticket:
        """Take a request, whose `listener` is then told its events in the engine's thread, in their order.

        The prompt is encoded here, in the caller's thread. What only the model's memory can tell, that a request never
        fits for instance, is told as `Failed`, before `Begun`.
        Raises ModelNotFoundError, PromptError, ContextLengthError, ChatError or OptionError for a request that cannot
        be, QueueFullError where too many wait, and ClosedError.
        """
        tokenizer, config = self._models.tokenizer(work.model), self._models.config(work.model)
        check_size(work, tokenizer, config.max_position_embeddings)
        ticket = Ticket(work, tokenizer, listener, self._wake)
        check_length(config, len(ticket.prompt))
        with self._taking:
            if self._closed is not None:
                raise self._closed
            waiting = sum(ticket.waiting for ticket in self._tickets)
            if waiting >= self._queue:
                least, most = _RETRY_SECONDS
                raise QueueFullError(f"{waiting:,} requests wait already", min(max(self._interval, least), most))
            self._tickets.append(ticket)
            self._messages.put(lambda: self._waiting.append(ticket))
        return ticket

    def alive(self, within: float = 5.0) -> bool:
        """Whether the thread takes a step, or loads a model, in that many seconds."""
        answered = threading.Event()
        self._messages.put(answered.set)
        return answered.wait(within if self._thread.is_alive() else 0) or (
            self._models.loading and self._thread.is_alive()
        )

    def figures(self) -> Figures:
        """What it is doing."""
        with self._taking:
            waiting, all_tickets = sum(ticket.waiting for ticket in self._tickets), len(self._tickets)
        return Figures(
            running=all_tickets - waiting,
            waiting=waiting,
            read_tokens=self._read_tokens,
            reused_tokens=self._reused_tokens,
            made_tokens=self._made_tokens,
            memory=mx.get_active_memory(),
            memory_limit=self._models.limit,
            prefix_memory=self._prefix_memory,
            loaded=self._loaded,
        )

    def close(self, wait: bool = True) -> None:
        """Take no more requests, and end the thread. What runs is finished if `wait`, and else fails as what waits."""
        with self._taking:
            self._closed = self._closed or ClosedError("the server is ending and takes no more requests")
        self._messages.put(lambda: self._end(wait))
        self._thread.join()

    def _wake(self) -> None:
        self._messages.put(lambda: None)

    # In the thread.

    def _run(self) -> None:
        try:
            with ExitStack() as limits:
                buffers = _BUFFERS
                if self._models.limit is not None:
                    buffers = min(buffers, self._models.limit // 16)
                    limits.enter_context(machine.memory_limit(self._models.limit - buffers))
                limits.enter_context(machine.bounded_run(buffers))
                while not self._ending or self._tickets:
                    self._go_on()
                self._models.clear()
        except BaseException as error:
            died = ClosedError(f"the engine has died of {type(error).__name__}: {error}")
            died.__cause__ = error
            with self._taking:
                self._closed = died
            self._fail(self._tickets, died)

    def _end(self, wait: bool) -> None:
        self._ending = True
        ending = ClosedError("the server is ending")
        self._fail([ticket for ticket in self._tickets if ticket.waiting or not wait], ending)

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in list(tickets):
            ticket.fail(error)

    def _go_on(self) -> None:
        """Hear what came in, and let each model take a step."""
        busy = bool(self._waiting) or any(loaded.scheduler.busy for loaded in self._models.loaded())
        try:
            self._messages.get(block=not busy)()
            while True:
                self._messages.get_nowait()()
        except Empty:
            pass
        self._forget()
        self._hand_over()
        for loaded in self._models.loaded():
            if loaded.scheduler.busy:
                self._step(loaded)
        self._loaded = tuple(loaded.served.name for loaded in self._models.loaded())
        self._forget()

    def _forget(self) -> None:
        """Let go of requests that are over."""
        over = [ticket for ticket in self._tickets if ticket.over]
        if not over:
            return
        for ticket in over:
            for row in ticket.rows:
                row.finish()
        self._parts = {key: part for key, part in self._parts.items() if not part.ticket.over}
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.over)
        with self._taking:
            self._tickets = [ticket for ticket in self._tickets if not ticket.over]
        now = time.monotonic()
        self._interval += ((now - self._last_end) / len(over) - self._interval) / 8
        self._last_end = now

    def _hand_over(self) -> None:
        """Give requests to their models' schedulers, in their order, as long as memory lasts."""
        lacking = self._lacks_memory()
        while self._waiting and not lacking:
            ticket = self._waiting[0]
            try:
                loaded = self._models.get(ticket.work.model)
                if loaded is None:
                    return  # others have to end first
                self._submit(loaded, ticket)
            except Exception as error:
                ticket.fail(error)
            self._waiting.popleft()

    def _lacks_memory(self) -> bool:
        """Whether a job waits for memory, though no model is left that could be put away for it."""
        lacking = [loaded.scheduler for loaded in self._models.loaded() if loaded.scheduler.lacks]
        if lacking and self._models.put_away():
            for scheduler in lacking:
                scheduler.retry()
            return False
        return bool(lacking)

    def _submit(self, loaded: Loaded, ticket: Ticket) -> None:
        """Let the next answers of a request join."""
        for job in ticket.next_jobs():
            row = loaded.scheduler.submit(job)
            self._parts[loaded.scheduler, row.index] = _Part(row, ticket, len(ticket.rows))
            ticket.rows.append(row)

    def _step(self, loaded: Loaded) -> None:
        """Let a model take a step, and tell what it gave."""
        try:
            step = loaded.scheduler.step()
        except Exception as error:  # of which request cannot be told
            self._lose(loaded, error)
            return
        scheduler, parts = loaded.scheduler, self._parts
        self._read_tokens += step.read_tokens
        for row in step.read:
            if (part := parts.get((scheduler, row.index))) is not None:
                self._progressed(loaded, part)
        for token in step.tokens:
            part = parts.get((scheduler, token.row))
            if part is not None and not part.row.cancelled:  # perhaps by a token of this step
                self._made_tokens += 1
                if part.ticket.took(part.index, token) and token.finish_reason is None:
                    part.row.finish()
        for row in step.ended:
            part = parts.pop((scheduler, row.index), None)
            if part is not None and row.error is not None:
                part.ticket.fail(row.error)
            row.let_go()
        if step.ended:
            self._prefix_memory = self._models.prefixes.nbytes
            for other in self._models.loaded():
                other.scheduler.retry()

    def _progressed(self, loaded: Loaded, part: _Part) -> None:
        """Tell that more of a prompt is read. Once it is read, the other answers join."""
        if part.index:
            return
        if part.ticket.progressed():
            self._reused_tokens += part.row.reused
            try:
                self._submit(loaded, part.ticket)
            except Exception as error:
                part.ticket.fail(error)

    def _lose(self, loaded: Loaded, error: Exception) -> None:
        """Fail all requests of a model, and of those that share its weights, and load it anew for the next."""
        base = loaded.served.base
        self._fail([t for t in self._tickets if self._models.source(t.work.model).base == base], error)
        self._forget()
        self._models.drop(base)
