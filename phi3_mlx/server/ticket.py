"""One client's request while it is answered: what the engine is asked to do for it, and what its listener is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.jobs import Job
from ..engine.rows import Row
from ..engine.tokens import Token
from ..generation.answer import Answer, begin_answers
from ..generation.answers import encode_prompt
from .work import Begun, Ended, Event, EventListener, Failed, Piece, Reading, TokenInfo, Work

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


class Ticket:
    """A request that was taken. `cancel` is for any thread, all else for the engine's.

    Its first answer reads the prompt; the others join then, and take over what that has read.
    """

    def __init__(self, work: Work, tokenizer: Tokenizer, listener: EventListener, wake: Callable[[], None]):
        self.work = work
        self.prompt = encode_prompt(tokenizer, work.prompt, raw=work.request.raw)
        self._tokenizer, self._listener, self._wake = tokenizer, listener, wake
        self._answers = _answers(work, tokenizer, self.prompt)
        self._said = [0] * len(self._answers)  # tokens
        self._left = len(self._answers)
        self._told = threading.RLock()
        self.rows: list[Row] = []
        self.over = False  # nothing is told any more

    def cancel(self) -> None:
        """End the request within a step. Nothing is told when this has returned."""
        with self._told:
            self.over = True
        self._wake()

    @property
    def waiting(self) -> bool:
        """Whether nothing was computed of it."""
        return not self.over and not any(row.begun for row in self.rows)

    def next_jobs(self) -> list[Job]:
        """The job of the first answer; once that has read the prompt, those of the others."""
        first = len(self.rows)
        return [answer.job for answer in self._answers[first : None if first else 1]]

    def tell(self, event: Event) -> None:
        """Tell the listener, unless the request is over. One that raises has ended its own request."""
        with self._told:
            if self.over:
                return
            self.over = isinstance(event, Failed)
            try:
                self._listener(event)
            except Exception:
                self.over = True

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.tell(Failed(error))

    def progressed(self) -> bool:
        """Tell how much of the prompt is read; whether all of it is."""
        row = self.rows[0]
        if row.progress < len(self.prompt):
            self.tell(Reading(row.progress, len(self.prompt)))
            return False
        self.tell(Begun(len(self.prompt), row.reused))
        return True

    def took(self, index: int, token: Token) -> bool:
        """Tell of one more token of an answer; whether the answer ends with it."""
        text, reason = self._answers[index].take(token)
        self._said[index] += 1
        self.tell(Piece(index, text, (self._info(token),)))
        if reason is not None:
            self.tell(Ended(index, reason, self._said[index]))
            self._left -= 1
            self.over = self.over or not self._left
        return reason is not None

    def _info(self, token: Token) -> TokenInfo:
        return TokenInfo(token.id, self._tokenizer.token_bytes(token.id), 0, token.logprob)


def _answers(work: Work, tokenizer: Tokenizer, prompt: list[int]) -> list[Answer]:
    """As many answers as are asked for, each with a seed of its own."""
    answers = begin_answers(tokenizer, [prompt] * work.n, work.request)
    if (seed := work.request.seed) is not None:
        for index, answer in enumerate(answers):
            sampling = replace(answer.job.sampling, seed=(seed + index) % 2**64)
            answer.job = replace(answer.job, sampling=sampling)
    return answers
