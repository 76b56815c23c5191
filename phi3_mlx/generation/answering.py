"""Many prompts answered, some at a time: each by its own request, with what they begin with read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.machine import bounded_run
from ..engine.prefixes import PrefixStore
from ..engine.rows import Row, raise_first
from ..engine.scheduler import Scheduler
from ..engine.tokens import FinishReason, Token
from ..models.decoder import Model
from .answer import Answer, begin_answers
from .request import Request

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_ANSWERS_AT_ONCE = 16  # answers: weights are read once for all of them, and each holds a cache


@dataclass(frozen=True)
class FinishedAnswer:
    """An answer, without what ended it; why it ended ("length": its budget was used up); its tokens, that too."""

    text: str
    finish_reason: FinishReason
    tokens: int = 0


def answer_each(
    model: Model,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Sequence[int], Request]],
    *,
    prefixes: PrefixStore | None = None,
    force: bool = False,
) -> Generator[tuple[int, FinishedAnswer], None, None]:
    """The answers to prompts of token ids, each with its place, as they end.

    Each is what `generate` gives for it alone. Raises PromptError, OptionError and MemoryLimitError as `generate`.
    """
    waiting = deque(enumerate(_begun(tokenizer, asked)))
    running: dict[int, _Begun] = {}
    runs = Scheduler(model, force=force, prefixes=prefixes)

    def let_join() -> None:
        while waiting and len(running) < _ANSWERS_AT_ONCE:
            place, answer = waiting.popleft()
            row = runs.submit(answer.job)
            running[row.index] = _Begun(place, row, answer)

    let_join()
    raise_first(runs.admit())
    try:
        with bounded_run(runs.spare):
            while running:
                step = runs.step()
                raise_first(step.failed)
                for token in step.tokens:
                    if token.row in running and running[token.row].take(token):
                        ended = running.pop(token.row)
                        yield ended.place, ended.answered
                for row in step.ended:
                    row.let_go()
                let_join()
    finally:
        runs.end()


class _Begun:
    """An answer that is being made, at its place among all."""

    def __init__(self, place: int, row: Row, answer: Answer):
        self.place, self._row, self._answer = place, row, answer
        self._pieces: list[str] = []
        self._tokens = 0
        self._reason: FinishReason | None = None

    def take(self, token: Token) -> bool:
        """Add a token; whether it was the last."""
        self._tokens += 1
        text, self._reason = self._answer.take(token)
        self._pieces.append(text)
        if self._reason is not None:
            self._row.finish()
        return self._reason is not None

    @property
    def answered(self) -> FinishedAnswer:
        assert self._reason is not None
        return FinishedAnswer("".join(self._pieces), self._reason, self._tokens)


def _begun(tokenizer: Tokenizer, asked: Sequence[tuple[Sequence[int], Request]]) -> list[Answer]:
    """An answer to begin for each prompt; those of one request have their stops in common."""
    places: dict[Request, list[int]] = {}
    for place, (_, request) in enumerate(asked):
        places.setdefault(request, []).append(place)
    answers: dict[int, Answer] = {}
    for request, alike in places.items():
        prompts = [asked[place][0] for place in alike]
        answers.update(zip(alike, begin_answers(tokenizer, prompts, request), strict=True))
    return [answers[place] for place in range(len(asked))]
