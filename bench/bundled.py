"""The tables of weights/tiny/README.md, from what weights/training/evaluate.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_EVALUATION = Path(__file__).resolve().parent.parent / "weights" / "tiny" / "evaluation.json"


def _read() -> dict[str, Any]:
    return json.loads(_EVALUATION.read_text(encoding="utf-8"))


def _shares(by_length: dict[str, float]) -> tuple[str, str]:
    """Lengths and shares, each in a row."""
    return " / ".join(f"{int(length):,}" for length in by_length), " / ".join(f"{s:.0%}" for s in by_length.values())


def bundled_figures() -> str:
    """What was measured on held-out stories, requests and planted facts."""
    found = _read()
    lengths, facts = _shares(found["planted_facts"])
    long, short = _shares(found["planted_facts_with_short_factors"])
    each = found["facts_of_each_length"]
    stories = f"{found['held_out_stories']} held-out TinyStories, the first after `random.Random(0).shuffle`"
    rows = {
        stories: (
            f"**{found['bits_per_character']:.3f} bits per character**, perplexity {found['perplexity']:.2f} a token "
            f"({found['characters_per_token']:.2f} characters)"
        ),
        f"requested words used, 3 in each of {found['requests']} requests from held-out stories, temperature 0.7": (
            f"{found['requested_words_used']:.0%}"
        ),
        "answers that end by themselves, of the same": f"{found['answers_that_end']:.0%}",
        f"a planted fact repeated word for word, in unread text of {lengths} tokens, {each} of each length": facts,
        f"the same with the short factors pinned, at {long} tokens": short,
    }
    return "\n".join(["| what | result |", "|---|---|", *(f"| {what} | {result} |" for what, result in rows.items())])


def bundled_samples() -> str:
    """Prompts and greedy answers."""
    parts = []
    for prompt, answer in _read()["samples"].items():
        quoted = "\n".join(f"> {line}" for line in answer.splitlines())
        parts.append(f"**{prompt}**\n\n{quoted}\n")
    return "\n".join(parts)
