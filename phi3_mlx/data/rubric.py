"""What a model is asked about each text, and what its answers count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError

PLACE_OF_TEXT = "{text}"
EDUCATIONAL = """\
Rate the educational value of a text from 0 to 5. It teaches well if it is clear and correct, explains what it is \
about, and could help pupils of a school.
0: nothing to learn: advertisements, lists, noise, no real sentences.
1: a little information, among much else.
2: touches what can be learnt, without order or with faults.
3: useful for pupils, but incomplete or hard to follow.
4: clear, in good order and useful.
5: outstanding: well written, complete, easy to learn from.
Answer with the number alone.

The text:
{text}

Its educational value, from 0 to 5, is:"""


@dataclass(frozen=True)
class TextRubric:
    """A question about a text, which stands between `before` and `after`, the answers and their values.

    What is before the text is the same for all, so a model reads it once.
    """

    before: str
    after: str
    choices: tuple[str, ...]
    values: tuple[float, ...]

    def question(self, text: str) -> str:
        """What the model reads."""
        return f"{self.before}{text}{self.after}"

    def expected(self, logprobs: Sequence[float]) -> tuple[float, float]:
        """The expected value of the answer, as one of the choices, and how probable it is that it is one.

        `logprobs`: the natural log-probability of each choice.
        """
        top = max(logprobs)
        weights = [math.exp(logprob - top) for logprob in logprobs]
        value = math.fsum(w * value for w, value in zip(weights, self.values, strict=True)) / math.fsum(weights)
        return value, min(1.0, math.fsum(map(math.exp, logprobs)))


def make_rubric(text: str, scale: Sequence[str]) -> TextRubric:
    """The rubric that a text and a scale describe.

    The text says with {text} where each text is put, or else it comes at the end. The scale has the answers, each a
    number, or NAME=VALUE. Raises OptionError.
    """
    if not text.strip():
        raise OptionError("the rubric is empty; say in it how a text is to be rated")
    before, place, after = text.partition(PLACE_OF_TEXT)
    if PLACE_OF_TEXT in after:
        raise OptionError(f"the rubric has {PLACE_OF_TEXT} several times; write it once, where each text is put")
    if not place:
        before = f"{text.rstrip()}\n\n"
    choices, values = [], []
    for answer in scale:
        choice, value = _answer(answer)
        if choice in choices:
            raise OptionError(f"scale has the answer {choice!r} twice; give it once")
        choices.append(choice)
        values.append(value)
    if len(set(values)) < 2:
        raise OptionError(f"scale {','.join(scale)!r} has fewer than two values; give two or more, such as 0,1,2")
    return TextRubric(before, after, tuple(choices), tuple(values))


def _answer(given: str) -> tuple[str, float]:
    """An answer and its value."""
    name, equals, text = given.rpartition("=")
    choice = (name if equals else given).strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"scale has {given!r}; give numbers such as 0,1,2, or NAME=NUMBER")
    if not choice:
        raise OptionError(f"scale has {given!r}, which names no answer; give numbers such as 0,1,2, or NAME=NUMBER")
    return choice, value
