"""What distillation gave a packed model, on the text it was trained on and on what was held out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gain:
    """KL(source || packed) in nats a token, before and after: on text trained on, and on as much that was held out."""

    before: float
    after: float
    held_before: float
    held_after: float


def gain_markdown(gain: Gain) -> str:
    """A section for REPORT.md."""
    return f"""## What distillation gave

KL divergence from the source in nats a token, its likeliest tokens and the rest in one bucket. The state of least
divergence on the text held out is kept; the further apart the two texts, the more a longer one would give.

| text | after GPTQ | after distillation |
|---|--:|--:|
| trained on | {gain.before:.5f} | {gain.after:.5f} |
| held out | {gain.held_before:.5f} | {gain.held_after:.5f} |
"""
