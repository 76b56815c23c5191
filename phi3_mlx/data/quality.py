"""What Gopher's and C4's authors asked of a web page, as rules with names: a number of a text, and its bounds.

Gopher is Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1), C4 is Raffel et al. 2020 (arXiv 1910.10683, section 2.2).
Words are what white space separates. Of a text without words or lines, every share is 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from .shingles import run_hashes, word_hashes

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLET = re.compile(r"[•‣◦▪●○■□]|[-–*+]\s")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*\s+""")
_END_MARKS = (".", "!", "?", '"', "”")
_ELLIPSES = ("...", "…")
_POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
_LEAST_WORDS = 5  # of a line of C4


class TextParts:
    """A text, and what several rules look at of it, each computed once."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not blank, without the space around them."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in _PARAGRAPHS.split(self.text) if part.strip()]

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """Characters of each word, int64 (number of words,)."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def hashes(self) -> np.ndarray:
        return word_hashes(self.words)


@dataclass(frozen=True)
class Rule:
    """A record stays if `measure` of its text is at least `least` and at most `most`."""

    measure: Callable[[TextParts], float]
    least: float = float("-inf")
    most: float = float("inf")

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most

    @property
    def said(self) -> str:
        """The bounds, as reports have them."""
        least = "" if self.least == float("-inf") else f"at least {self.least:,g}"
        most = "" if self.most == float("inf") else f"at most {self.most:,g}"
        return " and ".join(filter(None, (least, most))) or "any"


def _share(count: float, total: int) -> float:
    return float(count) / total if total else 0.0


def _mean_word_length(parts: TextParts) -> float:
    return _share(parts.word_lengths.sum(), len(parts.words))


def _hash_symbols(parts: TextParts) -> float:
    return _share(parts.text.count("#"), len(parts.words))


def _ellipses(parts: TextParts) -> float:
    return _share(sum(map(parts.text.count, _ELLIPSES)), len(parts.words))


def _bullet_lines(parts: TextParts) -> float:
    return _share(sum(_BULLET.match(line) is not None for line in parts.lines), len(parts.lines))


def _ellipsis_lines(parts: TextParts) -> float:
    return _share(sum(line.endswith(_ELLIPSES) for line in parts.lines), len(parts.lines))


def _alphabetic_words(parts: TextParts) -> float:
    return _share(sum(any(map(str.isalpha, word)) for word in parts.words), len(parts.words))


def _stop_words(parts: TextParts) -> float:
    """How many of the eight are there."""
    return len(_STOP_WORDS & {word.strip(".,;:!?\"'()“”‘’").lower() for word in parts.words})


def _duplicate_share(pieces_of: Callable[[TextParts], list[str]], parts: TextParts) -> float:
    pieces = pieces_of(parts)
    return _share(len(pieces) - len(set(pieces)), len(pieces))


def _duplicate_characters(pieces_of: Callable[[TextParts], list[str]], parts: TextParts) -> float:
    pieces = pieces_of(parts)
    repeated = sum(len(piece) * (count - 1) for piece, count in Counter(pieces).items())
    return _share(repeated, sum(map(len, pieces)))


def _top_ngram(length: int, parts: TextParts) -> float:
    """The share of characters in the most frequent n-gram, of several the longest; 0 if none is there twice."""
    runs = run_hashes(parts.hashes, length)
    _, first, which, counts = np.unique(runs, return_index=True, return_inverse=True, return_counts=True)
    if not len(runs) or counts.max() == 1:
        return 0.0
    ends = np.concatenate([[0], parts.word_lengths.cumsum()])
    characters = ends[first + length] - ends[first]
    top = np.where(counts == counts.max(), characters, 0).argmax()
    return _covered(parts, which == top, length)


def _duplicate_ngrams(length: int, parts: TextParts) -> float:
    """The share of characters in n-grams that are there more than once."""
    runs = run_hashes(parts.hashes, length)
    _, which, counts = np.unique(runs, return_inverse=True, return_counts=True)
    return _covered(parts, counts[which] > 1, length)


def _covered(parts: TextParts, begins: np.ndarray, length: int) -> float:
    """The share of the words' characters in runs of `length` words that begin there; each counts once."""
    ends = np.zeros(len(parts.words) + 1, np.int64)
    ends[: len(begins)] += begins
    ends[length : length + len(begins)] -= begins
    return _share(parts.word_lengths[ends.cumsum()[:-1] > 0].sum(), int(parts.word_lengths.sum()))


def _characters(parts: TextParts) -> float:
    return len(parts.text)


def _words(parts: TextParts) -> float:
    return len(parts.words)


def _lines_of(parts: TextParts) -> list[str]:
    return parts.lines


def _paragraphs_of(parts: TextParts) -> list[str]:
    return parts.paragraphs


def _sentences(parts: TextParts) -> float:
    return sum(bool(piece.strip()) for piece in _SENTENCE_END.split(parts.text))


def _lorem_ipsum(parts: TextParts) -> float:
    return parts.text.lower().count("lorem ipsum")


def _curly_brackets(parts: TextParts) -> float:
    return parts.text.count("{")  # the one that the paper names


_QUALITY = {
    "words": Rule(_words, least=50, most=100_000),
    "mean-word-length": Rule(_mean_word_length, least=3, most=10),
    "hash-symbols": Rule(_hash_symbols, most=0.1),
    "ellipses": Rule(_ellipses, most=0.1),
    "bullet-lines": Rule(_bullet_lines, most=0.9),
    "ellipsis-lines": Rule(_ellipsis_lines, most=0.3),
    "alphabetic-words": Rule(_alphabetic_words, least=0.8),
    "stop-words": Rule(_stop_words, least=2),
}
REPEATS = {
    "duplicate-lines": Rule(partial(_duplicate_share, _lines_of), most=0.3),
    "duplicate-paragraphs": Rule(partial(_duplicate_share, _paragraphs_of), most=0.3),
    "duplicate-line-characters": Rule(partial(_duplicate_characters, _lines_of), most=0.2),
    "duplicate-paragraph-characters": Rule(partial(_duplicate_characters, _paragraphs_of), most=0.2),
    **{f"top-{n}-gram": Rule(partial(_top_ngram, n), most=most) for n, most in ((2, 0.20), (3, 0.18), (4, 0.16))},
    **{f"duplicate-{n}-grams": Rule(partial(_duplicate_ngrams, n), most=most)
       for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))},
}  # fmt: skip
_PAGES = {
    "sentences": Rule(_sentences, least=3),
    "lorem-ipsum": Rule(_lorem_ipsum, most=0),
    "curly-brackets": Rule(_curly_brackets, most=0),
}
RULES = {"characters": Rule(_characters), **_QUALITY, **REPEATS, **_PAGES}  # of whole records

# Rules of lines, which leave the line out and keep the others: whether a line stays.
LINE_RULES: dict[str, Callable[[str], bool]] = {
    "terminal-punctuation": lambda line: line.endswith(_END_MARKS) and not line.endswith(_ELLIPSES),
    "words-per-line": lambda line: len(line.split()) >= _LEAST_WORDS,
    "javascript": lambda line: "javascript" not in line.lower(),
    "policy-lines": lambda line: not any(policy in line.lower() for policy in _POLICIES),
}
RULE_SETS = {
    "length": ("characters", "words"),
    "gopher": (*_QUALITY, *REPEATS),
    "c4": (*LINE_RULES, *_PAGES),
}
