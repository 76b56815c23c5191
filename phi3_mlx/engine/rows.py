"""The rows of a batch: each a prompt, and how far its answer is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .tokens import FinishReason, Token


class Row:
    """A prompt and its answer: `budget` tokens, or fewer where one of `stop_ids` or the caller ends it."""

    def __init__(self, index: int, prompt: Sequence[int], budget: int, stop_ids: Collection[int] = ()):
        self.index, self.prompt, self.budget = index, prompt, budget
        self.said = 0  # tokens of the answer so far
        self._stop_ids = stop_ids
        self._ended = False

    @property
    def left(self) -> int:
        """How many more tokens the budget allows."""
        return self.budget - self.said

    @property
    def finished(self) -> bool:
        return self._ended or self.left <= 0

    def finish(self) -> None:
        """End the answer here."""
        self._ended = True

    def say(self, token: int, logprob: float) -> Token:
        """Add the next token of the answer, and end the row with it where it is the last."""
        self.said += 1
        reason: FinishReason | None = None
        if token in self._stop_ids:
            reason = "stop"
            self.finish()
        elif self.finished:
            reason = "length"
        return Token(self.index, token, logprob, reason)
