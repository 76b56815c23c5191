"""The texts that measurements read: the bundled ones, and how a text becomes windows of tokens."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from ..errors import PromptError
from ..evaluation.quality import blocks
from ..files import json_text

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .sources import Source

_RUN = 8  # words
REPORT_WINDOW = 512  # tokens of a text that a report reads together
CALIBRATION_TOKENS = 32_768  # of the bundled calibration text: a tokenizer of few words makes more of it


def bundled(kind: Literal["sample", "calibration", "reading"]) -> str:
    """One of the texts that come with this package.

    Reports read "sample"; whatever is fitted to a text, bits or weights, reads "calibration" and, if it takes more than
    that, "reading". No eight words in a row of the sample are in the others, so a report never praises a model for
    knowing its test. English: "sample" and "calibration" were written for this package (stories, talk, explanations,
    lists, code), "reading" is pages of old books, of this package's documentation and of its code, in turns.
    """
    return files(__package__).joinpath(f"{kind}.txt").read_text(encoding="utf-8")


def calibration() -> str:
    """What weights are fitted to where nobody gives a text: 24,000 tokens or more."""
    return f"{bundled('calibration')}\n{bundled('reading')}"


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer that a source brings."""
    from ..text.tokenizer import read_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source.write_extras(Path(folder))
        Path(folder, "config.json").write_text(json_text(source.raw_config), encoding="utf-8")  # names EOS, too
        return read_tokenizer(Path(folder))


def check_can_be_read(tokenizer: Tokenizer, text: str) -> None:
    """PromptError for a text of a report, `text`, in which nothing is to be predicted."""
    bos = tokenizer.bos_token_id if tokenizer.add_bos_token else None
    next(blocks(tokenizer.encode(text), REPORT_WINDOW, bos))


def calibration_ids(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """What bits and weights are fitted to: a text, or the bundled one that reports do not read."""
    return tokenizer.encode(calibration())[:CALIBRATION_TOKENS] if text is None else tokenizer.encode(text)


def shared_runs(text: str, other: str) -> float:
    """The share of a text's runs of eight words that another text has too; 0 for a shorter text."""
    ours, theirs = _runs(text), _runs(other)
    return len(ours & theirs) / max(1, len(ours))


def _runs(text: str) -> set[tuple[str, ...]]:
    spelled = re.findall(r"\w+", text.lower())
    return {tuple(spelled[i : i + _RUN]) for i in range(len(spelled) - _RUN + 1)}


def windows(ids: Sequence[int], length: int) -> mx.array:
    """A text's token ids as int32 (rows, length), the rest that fills no window left out.

    Raises PromptError for a text shorter than one window.
    """
    rows = len(ids) // length
    if rows == 0:
        raise PromptError(f"the calibration text has {len(ids):,} tokens, and {length:,} are needed; give a longer one")
    return mx.array(list(ids[: rows * length]), dtype=mx.int32).reshape(rows, length)
