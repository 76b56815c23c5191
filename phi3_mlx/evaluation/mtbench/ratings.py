"""What a judge said, read by FastChat's rule."""

from __future__ import annotations

import re
from typing import Literal

Winner = Literal["A", "B", "tie", "error"]

NO_RATING = -1.0
_RATING = r"(\d+(?:\.\d*)?)"
_IN_TWO_BRACKETS, _IN_ONE_BRACKET = re.compile(rf"\[\[{_RATING}\]\]"), re.compile(rf"\[{_RATING}\]")
_VERDICTS: tuple[tuple[str, Winner], ...] = (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"))


def rating_of(judgment: str) -> float:
    """The first number in double brackets; without one, the first in single brackets; without either, -1."""
    match = _IN_TWO_BRACKETS.search(judgment) or _IN_ONE_BRACKET.search(judgment)
    return float(match[1]) if match else NO_RATING


def verdict_of(judgment: str) -> Winner:
    """Which of two answers a judge prefers: [[A]] before [[B]] before [[C]], a tie, wherever they stand."""
    return next((winner for mark, winner in _VERDICTS if mark in judgment), "error")
