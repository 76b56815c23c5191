"""Prompts of a given length in tokens: as much haystack as fits, and needles at their depths."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ...errors import OptionError
from ...generation.answers import encode_prompt
from ...text.spans import encode_after
from .tasks import Needle, Puzzle

if TYPE_CHECKING:
    from ...text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fitted:
    """A prompt's ids, and the text that its user's message has; with the answer it has `length` tokens at most."""

    ids: tuple[int, ...]
    text: str


class Fitter:
    """Makes prompts of one tokenizer. How long a sentence is, it counts once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._sizes: dict[str, int] = {}

    def fit(self, puzzle: Puzzle, length: int, name: str) -> Fitted:
        """The longest prompt that has at most `length` tokens together with the longest answer.

        Raises OptionError where not even the question fits.
        """
        sized, room = puzzle.sized_by or puzzle, length - puzzle.max_tokens
        made: dict[int, Fitted] = {}

        def tokens(units: int) -> int:
            if units not in made:
                made[units] = self._prompt(sized, units)
            return len(made[units].ids)

        if tokens(puzzle.least) > room:
            raise OptionError(
                f"lengths has {length:,}, too few tokens for {name}, whose question and answer alone have "
                f"{tokens(puzzle.least) + puzzle.max_tokens:,}; leave out the length or the task"
            )
        units = most_units(tokens, puzzle.least, room)
        return made[units] if puzzle.sized_by is None else self._prompt(puzzle, units)

    def _prompt(self, puzzle: Puzzle, units: int) -> Fitted:
        sentences = self.placed(puzzle.hay(units), puzzle.needles)
        text = f"{puzzle.before}{puzzle.joint}{puzzle.joint.join(sentences)}\n{puzzle.after}"
        ids = encode_prompt(self._tokenizer, [{"role": "user", "content": text}])
        return Fitted((*ids, *encode_after(self._tokenizer, ids, puzzle.prefix)), text)

    def placed(self, hay: Sequence[str], needles: Sequence[Needle]) -> list[str]:
        """The haystack with each needle where that share of its tokens is before it, as nearly as sentences allow."""
        before = [0, *accumulate(map(self._size, hay))]
        sentences: list[str] = []
        last = 0
        for needle in sorted(needles, key=lambda needle: needle.depth):
            at = nearest(before, needle.depth * before[-1])
            sentences += [*hay[last:at], needle.sentence]
            last = at
        return [*sentences, *hay[last:]]

    def _size(self, sentence: str) -> int:
        if sentence not in self._sizes:
            self._sizes[sentence] = len(self._tokenizer.encode(f" {sentence}"))
        return self._sizes[sentence]


def nearest(ascending: Sequence[int], target: float) -> int:
    """The place of the number nearest to `target`."""
    at = bisect.bisect_left(ascending, target)
    if at == len(ascending) or (at and target - ascending[at - 1] <= ascending[at] - target):
        return at - 1
    return at


def most_units(tokens: Callable[[int], int], least: int, room: int) -> int:
    """The most units, at least `least`, whose prompt has at most `room` tokens; more units are more tokens.

    It guesses from the tokens a unit of the last prompts, so it makes few of them: to encode a long one takes a while.
    """
    low, step = least, 8
    size = tokens(low)
    high = low + step
    while (longer := tokens(high)) <= room:
        a_unit = max((longer - tokens(low)) / (high - low), 0.1)
        low, size = high, longer
        high = low + max(int((room - size) / a_unit) + 2, step)
    while high - low > 1:
        share = (room - tokens(low)) / max(tokens(high) - tokens(low), 1)
        guess = low + round(share * (high - low))
        middle = min(max(guess, low + 1), high - 1)
        if tokens(middle) <= room:
            # The rest is nearly all: then the next above is too much.
            low = middle
            if high - low > 1 and tokens(low + 1) > room:
                high = low + 1
        else:
            high = middle
            if high - low > 1 and tokens(high - 1) <= room:
                low = high - 1
    return low
