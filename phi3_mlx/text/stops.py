"""Where an answer ends: at token ids, and at stop strings, which may span several tokens.

A stop string is searched in the text that the answer shows. If it contains a control token, which is not shown
(`"\\n<|user|>"`), that token's string is searched too. A stop string that is one token (`"<|user|>"`) stops at its id.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class Stops:
    """What ends the answers of a run.

    `ids`: the tokenizer's `stop_ids`, and those of stop strings that are one token. `hidden`: id -> string of the
    tokens that are not shown but occur in stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stops = stops
        added = tokenizer.added_tokens.values()
        encoded = [tokenizer.encode(stop, special=True) for stop in stops]
        added_ids = {token.id for token in added}
        self.ids = tokenizer.stop_ids | {ids[0] for ids in encoded if len(ids) == 1 and ids[0] in added_ids}
        unseen = tokenizer.special_ids | self.ids
        self.hidden = {
            token.id: token.content
            for token in added
            if token.id in unseen and any(token.content in stop for stop in stops)
        }

    def finder(self) -> StopStrings:
        return StopStrings(self._stops)


class StopStrings:
    """Finds stop strings in a stream of text: the one that is complete first and, of two at once, the longer."""

    def __init__(self, stops: Sequence[str]):
        self._progress = [_Progress(stop) for stop in stops]
        self._held: deque[tuple[str, bool]] = deque()  # characters that may belong to a stop string; are they shown?

    def add(self, text: str, hidden: str = "") -> tuple[str, bool]:
        """(the text that certainly stands before any stop string, whether one was reached).

        `hidden` follows `text` and may belong to a stop string, but is never returned.
        """
        if not self._progress:
            return text, False
        out: list[str] = []
        for n, character in enumerate(text + hidden):
            self._held.append((character, n < len(text)))
            reached = [stop.step(character) for stop in self._progress]
            met = max((stop.length for stop in self._progress if stop.complete), default=0)
            out += self._release(met or max(reached))
            if met:
                self._held.clear()
                return "".join(out), True
        return "".join(out), False

    def finish(self) -> str:
        """The text held back that turned out to be no stop string."""
        return "".join(self._release(0))

    def _release(self, keep: int) -> list[str]:
        """All but the last `keep` characters."""
        released = [self._held.popleft() for _ in range(len(self._held) - keep)]
        return [character for character, shown in released if shown]


class _Progress:
    """How much of a stop string the text ends with, character by character (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str):
        self._stop, self._reached = stop, 0
        # For each length, the next shorter beginning of the stop string that ends it too.
        self._shorter = [0]
        for character in stop[1:]:
            self._shorter.append(self._after(self._shorter[-1], character))

    @property
    def length(self) -> int:
        return len(self._stop)

    @property
    def complete(self) -> bool:
        return self._reached == len(self._stop)

    def step(self, character: str) -> int:
        self._reached = self._after(self._reached, character)
        return self._reached

    def _after(self, reached: int, character: str) -> int:
        while reached and (reached == len(self._stop) or self._stop[reached] != character):
            reached = self._shorter[reached - 1]
        return reached + (self._stop[reached] == character)
