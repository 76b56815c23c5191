"""What can be set when a model makes records."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..option import Range, option, settle
from ..values import number, refusal

KIND_NAMES = ("instructions", "passages", "questions", "preferences")
CHECK_NAMES = ("recompute", "score", "none")
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600}
_USUAL_RECORDS = 100
_ATTEMPTS_A_RECORD = 10


def _seconds(value: Any, name: str) -> float:
    """Seconds, of a number or of a text such as "90", "30m", "2h"."""
    if not isinstance(value, str):
        return number(value, name)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
    if not match:
        raise refusal(value, name, "seconds, or a time such as 30m or 2h")
    return float(match[1]) * _TIMES[match[2]]


_AT_LEAST_1 = Range(lambda n: n >= 1, "1 or more")


@dataclass(frozen=True)
class SynthesisOptions:
    """What is made, how it is drawn, what is refused, and when it is enough.

    Without a budget of `records`, `tokens` or `time` it is 100 records; `attempts` are 10 a record where records are
    counted. Raises OptionError, as `option` types and checks values.
    """

    kind: str = option("instructions", "What the records are.", choices=KIND_NAMES)
    records: int | None = option(
        None, "End at this many.", _AT_LEAST_1, metavar="N", shown_default="100, without --tokens and --time"
    )
    tokens: int | None = option(None, "End when the model has made this many.", _AT_LEAST_1, metavar="N")
    time: float | str | None = option(
        None, "End after this time of this run, in seconds, or as 30m or 2h.",
        Range(lambda seconds: 0 < seconds < math.inf, "more than 0"), read=_seconds, metavar="TIME",
    )  # fmt: skip
    attempts: int | None = option(
        None, "End when this many were made, refused ones too.", _AT_LEAST_1, metavar="N",
        shown_default="10 for each of --records",
    )  # fmt: skip
    temperature: float = option(1.0, "Draw from softmax(logits / T); 0: the likeliest, the same for a topic each time.",
                                Range(lambda t: 0 <= t < math.inf, "0 or more"))  # fmt: skip
    top_p: float = option(0.95, "Draw from the likeliest tokens that have this probability together.",
                          Range(lambda p: 0 < p <= 1, "above 0 and at most 1"))  # fmt: skip
    max_tokens: int = option(1024, "Longest answer; one that is cut by it is refused.", _AT_LEAST_1)
    max_characters: int | None = option(
        None, "Of each text that is made; a longer one is refused.", Range(lambda n: n >= 8, "8 or more"), metavar="N",
        shown_default="of a passage 3000, of others less",
    )  # fmt: skip
    seed: int = option(0, "Another seed makes other records.", Range(lambda n: 0 <= n < 2**63, "0 to 2**63 - 1"))
    parallel: int = option(16, "Attempts that are made together.", Range(lambda n: 1 <= n <= 16, "1 to 16"))
    threshold: float = option(
        0.7, "Refuse a text whose shingles have this Jaccard similarity, or more, with those of one that was made.",
        Range(lambda share: 0.1 <= share <= 1, "0.1 to 1"),
    )  # fmt: skip
    ngram: int = option(3, "Words in a shingle.", Range(lambda n: 1 <= n <= 100, "1 to 100"), metavar="N")
    verify: str | None = option(
        None, "Answer each question again and compare, or score answers by their log-probability.", choices=CHECK_NAMES,
        shown_default="questions: recompute; preferences: score; others: none",
    )  # fmt: skip
    agreement: float = option(
        0.5, "Least F1 of the words of the two answers, for recompute.", Range(lambda share: 0 < share <= 1, "0 to 1")
    )
    min_logprob: float = option(
        -2.0, "Least mean log-probability of a token of the answer, for score.", Range(lambda n: n <= 0, "at most 0")
    )
    min_words: int | None = option(
        None, "Of the passage or answer.", Range(lambda n: n >= 0, "0 or more"), metavar="N",
        shown_default="of a passage 30",
    )  # fmt: skip
    max_words: int | None = option(None, "Of the passage or answer.", Range(lambda n: n >= 0, "0 or more"), metavar="N")

    def __post_init__(self) -> None:
        settle(self)
        least, most = self.min_words or 0, self.max_words
        if most is not None and least > most:
            raise OptionError(f"min_words {least} is more than max_words {most}, which no text fits; change one")

    @property
    def wanted(self) -> int | None:
        """How many records are enough; None where tokens or time are counted alone."""
        counted_alone = self.tokens is not None or self.time is not None
        return self.records or (None if counted_alone else _USUAL_RECORDS)

    @property
    def most_attempts(self) -> int | None:
        if self.attempts is not None:
            return self.attempts
        return None if self.wanted is None else _ATTEMPTS_A_RECORD * self.wanted
