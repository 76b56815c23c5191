"""What can be set when data are read and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..option import Range, option, settle
from ..values import path, texts

COMPRESSIONS = ("gz", "zst")


@dataclass(frozen=True)
class ReadOptions:
    """How records are read. Raises OptionError, as `option` types and checks values."""

    field: str | None = option(
        None, 'The key that holds the text. Without it "text", or what the messages of a training example say.'
    )
    lines: bool = option(False, "Each line of a text file is a record; without this the file is one.")
    skip_broken: bool = option(
        False, "Leave out records that cannot be read, and count them, where the step would end."
    )

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class WriteOptions:
    """How a step's folder is written."""

    compress: str | None = option(None, "Compress the records that are written.", choices=COMPRESSIONS)
    force: bool = option(False, "Replace an earlier step's folder.")

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class WorkOptions:
    """How a step that looks at each record by itself works."""

    processes: int = option(
        1, "Work on the files in this many processes; the output is the same.", Range(lambda n: n >= 1, "1 or more")
    )

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class SplitOptions:
    """How records are dealt out."""

    part: tuple[str, ...] = option(
        ("train=0.95", "valid=0.05"), "A file to write, and its share of the records; may be repeated.",
        metavar="NAME=SHARE", shown_default="train=0.95 and valid=0.05",
    )  # fmt: skip
    seed: int = option(0, "Another seed deals the records out in another way.", Range(lambda n: n >= 0, "0 or more"))

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class MixOptions:
    """How records of several files are put together."""

    by: str = option("records", "What the shares are of.", choices=("records", "characters"))
    records: int | None = option(None, "End at this many.", Range(lambda n: n >= 1, "1 or more"), metavar="N")
    epochs: int = option(
        1, "Read a file at most this many times; the mix ends where its shares need more.",
        Range(lambda n: n >= 1, "1 or more"), metavar="N",
    )  # fmt: skip
    shuffle: int = option(
        1000, "Draw each record from this many, in 64 MB at most; 1: in the order of the files.",
        Range(lambda n: n >= 1, "1 or more"), metavar="N",
    )  # fmt: skip
    seed: int = option(0, "Another seed draws in another order.", Range(lambda n: n >= 0, "0 or more"))

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class DedupeOptions:
    """Which texts say the same."""

    threshold: float = option(
        0.8, "Remove a text whose shingles have this Jaccard similarity, or more, with those of a text before.",
        Range(lambda share: 0.1 <= share <= 1, "0.1 to 1"),
    )  # fmt: skip
    ngram: int = option(5, "Words in a shingle.", Range(lambda n: 1 <= n <= 100, "1 to 100"), metavar="N")
    exact: bool = option(False, "Remove equal texts alone.")

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class DecontaminateOptions:
    """What of an evaluation is looked for."""

    ngram: int = option(
        13,
        "Remove a text that shares this many words in a row.",
        Range(lambda n: 1 <= n <= 100, "1 to 100"),
        metavar="N",
    )
    against_field: str | None = option(
        None, "Look for this key of the evaluation's records alone, where all their texts are looked for."
    )

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class ScoreOptions:
    """What a model is asked about each text."""

    scale: Sequence[str] | str = option(
        "0,1,2,3,4,5", "The answers that the rubric asks for, with their values.",
        read=lambda value, name: _names(value, name), metavar="A,B,... or A=VALUE,...",
    )  # fmt: skip
    rating: bool = option(
        True, "Rate each text: the expected value of the model's answer.", flags="--rating/--no-rating",
    )  # fmt: skip
    perplexity: bool = option(False, "Say how likely each text is to the model, too: nats a token, bits a character.")
    max_length: int = option(
        1024, "Read this many tokens of a text at most; longer ones are cut and counted.",
        Range(lambda n: n >= 1, "1 or more"), metavar="TOKENS",
    )  # fmt: skip
    raw: bool = option(False, "Send the rubric as it is, without the chat template: for models that do not chat.")
    name: str | None = option(None, "Write NAME_rating, and so on, where records have these keys already.")

    def __post_init__(self) -> None:
        settle(self)
        if not self.rating and not self.perplexity:
            raise OptionError("rating=False leaves nothing to say; add perplexity=True")


def _names(value: Any, name: str) -> tuple[str, ...]:
    """Names, of a list or of a text with commas."""
    given = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in texts(given, name) if part.strip())


_AT_LEAST_0 = Range(lambda n: n >= 0, "0 or more")


_SHARE = Range(lambda share: 0 < share < 1, "more than 0 and less than 1")


@dataclass(frozen=True)
class TrainFilterOptions:
    """From what a classifier learns which texts are good."""

    label: str = option("rating", "The key of a record's rating or label.", metavar="KEY")
    threshold: float | None = option(
        None, "Texts that are rated so, or higher, are good.", Range(math.isfinite, "a finite number")
    )  # fmt: skip
    top: float | None = option(None, "This share of the texts, the highest rated, are good.", _SHARE, metavar="SHARE")
    good: tuple[str, ...] = option((), "Texts with this label are good; may be repeated.", metavar="LABEL")
    held_out: float = option(0.2, "Measure on this share of the texts, and learn from the others.", _SHARE)
    group: str | None = option(
        None, "Texts with the same value of this key are held out together: those of an article, of an author.",
        metavar="KEY",
    )  # fmt: skip
    examples: int = option(
        20_000, "Learn from this many at most, drawn from all; each takes up to 40 KB of memory.",
        Range(lambda n: n >= 100, "100 or more"), metavar="N",
    )  # fmt: skip
    seed: int = option(0, "Another seed draws others.", Range(lambda n: n >= 0, "0 or more"))

    def __post_init__(self) -> None:
        settle(self)
        ways = {"threshold": "threshold=RATING", "top": "top=SHARE", "good": "good=LABEL"}
        given = [way for name, way in ways.items() if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise OptionError(f"{given[1]} and {given[0]} both say which texts are good; give one of them")


@dataclass(frozen=True)
class FilterOptions:
    """What a record must be."""

    rules: Sequence[str] | str | None = option(
        None, "Rules, or sets of them, which commas separate: length, gopher, c4, pii; -NAME takes a rule away.",
        read=_names, metavar="A,B,-C", shown_default="gopher; none with --classifier",
    )  # fmt: skip
    classifier: str | None = option(
        None, "Keep what this classifier takes for good: what train-filter wrote.", metavar="FILE", read=path,
    )  # fmt: skip
    at_least: float | None = option(
        None, "The probability of being good from which on the classifier keeps a text.",
        Range(lambda share: 0 <= share <= 1, "0 to 1"), metavar="P", shown_default="0.5",
    )  # fmt: skip
    pii: str = option(
        "replace", "Write <EMAIL> and so on over personal data that are found, or drop the record.",
        choices=("replace", "drop"),
    )  # fmt: skip
    min_characters: int | None = option(None, "Of a text, for the rule characters.", _AT_LEAST_0, metavar="N")
    max_characters: int | None = option(None, "Of a text, for the rule characters.", _AT_LEAST_0, metavar="N")
    min_words: int | None = option(None, "Of a text, for the rule words.", _AT_LEAST_0, metavar="N", shown_default="50")
    max_words: int | None = option(
        None, "Of a text, for the rule words.", _AT_LEAST_0, metavar="N", shown_default="100000"
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.at_least is not None and self.classifier is None:
            raise OptionError(f"at_least {self.at_least:g} does nothing without a classifier; give classifier=FILE")
