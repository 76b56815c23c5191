"""One client's request while it is answered: what the engine is asked to do for it, and what its listener is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.alternatives import Alternatives
from ..engine.jobs import Job
from ..engine.rows import Row
from ..engine.tokens import FinishReason, Token
from ..generation.answer import Answer, begin_answers
from ..text.grammar import Form
from .prompts import prompt_and_form
from .work import Alternative, Begun, Ended, Event, EventListener, Failed, Piece, Reading, TokenInfo, Work

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


class Ticket:
    """A request that was taken. `cancel` is for any thread, all else for the engine's.

    Its first answer reads the prompt; the others join then, and take over what that has read.
    """

    def __init__(self, work: Work, tokenizer: Tokenizer, listener: EventListener, wake: Callable[[], None]):
        self.work = work
        self.prompt, form = prompt_and_form(work, tokenizer)
        self._tokenizer, self._listener, self._wake = tokenizer, listener, wake
        self._answers = _answers(work, tokenizer, self.prompt, form)
        self._said = [0] * len(self._answers)  # tokens
        self._echoed = tokenizer.decode(self.prompt) if work.echo else ""
        # An answer of a given form is one by itself, also behind its prompt.
        follows = bool(self._echoed) and form is None and work.request.form is None
        if follows:
            for answer in self._answers:
                answer.follow(self.prompt)
        self._texts = [_Spelling(tokenizer, first=not follows) for _ in self._answers]
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
        self.tell(Begun(len(self.prompt), row.reused, self._echo(row), self._echoed))
        if not self.work.n:
            self._end(0, "length")
        return True

    def took(self, index: int, token: Token) -> bool:
        """Tell of one more token of an answer; whether the answer ends with it."""
        text, reason = self._answers[index].take(token)
        self._said[index] += 1
        scored = self.work.top_logprobs is not None
        info = self._texts[index].info(token.id, token.logprob if scored else None, token.top)
        self.tell(Piece(index, text, (info,)))
        if reason is not None:
            self._end(index, reason)
        return reason is not None

    def _end(self, index: int, reason: FinishReason) -> None:
        """Tell that an answer has ended; with the last of them the request is over."""
        self.tell(Ended(index, reason, self._said[index]))
        self._left -= 1
        self.over = self.over or not self._left

    def _echo(self, row: Row) -> tuple[TokenInfo, ...]:
        """The prompt's tokens, if they are to be told."""
        if not self.work.echo:
            return ()
        texts = _Spelling(self._tokenizer)
        told = [texts.info(self.prompt[0], None, ())]
        if not row.scores:
            return tuple(told + [texts.info(token, None, ()) for token in self.prompt[1:]])
        for token, score in zip(self.prompt[1:], row.scores, strict=True):
            told.append(texts.info(token, score.logprob, score.top))
        return tuple(told)


class _Spelling:
    """Tokens of a text as clients see them, and where in it each begins. `first`: no other text stands before it."""

    def __init__(self, tokenizer: Tokenizer, *, first: bool = True):
        self._tokenizer = tokenizer
        self._unseen = tokenizer.special_ids | tokenizer.stop_ids
        self._characters = 0
        self._drops_space = first and tokenizer.drops_first_space

    def info(self, token: int, logprob: float | None, top: Alternatives) -> TokenInfo:
        """One more token."""
        spelled = self._tokenizer.token_bytes(token)
        alternatives = tuple(
            Alternative(other, self._tokenizer.token_bytes(other), likelihood) for other, likelihood in top
        )
        shown = b"" if token in self._unseen else spelled
        if shown and self._drops_space:
            self._drops_space, shown = False, shown.removeprefix(b" ")
        inside = bool(shown) and _continues(shown[0])  # of a character that began before
        offset = self._characters - inside
        self._characters += sum(not _continues(byte) for byte in shown)
        return TokenInfo(token, spelled, offset, logprob, alternatives)


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


def _answers(work: Work, tokenizer: Tokenizer, prompt: list[int], form: Form | None) -> list[Answer]:
    """As many answers as are asked for, each with a seed of its own; the first scores the prompt where it is echoed."""
    answers = begin_answers(tokenizer, [prompt] * max(work.n, 1), work.request, form)
    for index, answer in enumerate(answers):
        sampling = answer.job.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
        answer.job = replace(answer.job, sampling=sampling, top=work.top_logprobs or 0)
    first = answers[0]
    if work.echo and work.top_logprobs is not None:
        first.job = replace(first.job, scored_from=1)
    if not work.n:
        first.job = replace(first.job, max_tokens=0)
    return answers
