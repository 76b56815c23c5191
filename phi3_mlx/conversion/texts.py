"""The texts that measurements read: the bundled ones, and how a text becomes windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

import mlx.core as mx

from ..errors import PromptError


def bundled(kind: Literal["sample", "calibration"]) -> str:
    """One of the two texts that come with this package.

    Reports read "sample"; whatever is fitted to a text, bits or weights, reads "calibration", so that a report never
    praises a model for knowing its test. English, written for this package: stories, talk, explanations, lists, code.
    """
    return files(__package__).joinpath(f"{kind}.txt").read_text(encoding="utf-8")


def windows(ids: Sequence[int], length: int) -> mx.array:
    """A text's token ids as int32 (rows, length), the rest that fills no window left out.

    Raises PromptError for a text shorter than one window.
    """
    rows = len(ids) // length
    if rows == 0:
        raise PromptError(f"the text has {len(ids):,} tokens, and {length:,} are needed; give a longer one")
    return mx.array(list(ids[: rows * length]), dtype=mx.int32).reshape(rows, length)
