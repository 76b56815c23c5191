"""The options of sampling. Imports no MLX, so that the command line can show them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..option import Range, option, settle


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in transformers' order: temperature, top-k, top-p, min-p.

    - `temperature`: 0 takes the likeliest token, which no filter excludes; higher is more varied.
    - `top_k`: only the k likeliest tokens (0: all). `top_p`: only the likeliest that together reach p (1: all).
    - `min_p`: only tokens at least this fraction as likely as the likeliest (0: all).
    - `repetition_penalty`: above 1 makes tokens of the prompt and the answer so far less likely (arXiv 1909.05858).
    - `presence_penalty`, `frequency_penalty`: what the logit of a token of the answer so far loses, once, and for each
      time that it occurs; below 0 it gains. As OpenAI's.
    - `seed`: the same seed gives the same tokens; None: different each time.

    Raises OptionError for a value of another type or outside its range.
    """

    temperature: float = option(
        0.0,
        "0: always the likeliest token; 0.7: varied; above 1: often incoherent.",
        Range(lambda t: 0 <= t < math.inf, "0 or more"),
        shown_default="0.0",
    )
    top_p: float = option(
        1.0,
        "Sample from the likeliest tokens whose probabilities sum to P.",
        Range(lambda p: 0 < p <= 1, "above 0 and at most 1"),
        shown_default="",
    )
    top_k: int = option(
        0, "Sample from the K likeliest tokens; 0: from all.", Range(lambda k: k >= 0, "0 (off) or more")
    )
    min_p: float = option(
        0.0,
        "Sample from tokens at least P times as likely as the likeliest.",
        Range(lambda p: 0 <= p <= 1, "between 0 and 1"),
    )
    repetition_penalty: float = option(
        1.0,
        "Above 1: make tokens that already occurred less likely.",
        Range(lambda r: 0 < r < math.inf, "above 0"),
        shown_default="",
    )
    presence_penalty: float = option(
        0.0,
        "Above 0: make tokens that the answer has less likely; below: more.",
        Range(math.isfinite, "a finite number"),
        shown_default="",
    )
    frequency_penalty: float = option(
        0.0,
        "As the presence penalty, for each time that the answer has the token.",
        Range(math.isfinite, "a finite number"),
        shown_default="",
    )
    seed: int | None = option(None, "Repeat the same draw.", Range(lambda s: 0 <= s < 2**64, "0 to 2**64 - 1"))

    def __post_init__(self) -> None:
        settle(self)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the model's likeliest token is always drawn."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return self.temperature == 0 and not any(penalties)
