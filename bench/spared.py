"""The tables of what need not be computed again, in Markdown.

Prompts that begin alike, the tokens that a schema leaves no choice of, and those that a draft model guesses right.
"""

from __future__ import annotations

from .published import read, sources


def evaluating() -> str:
    """Questions a second through three language models for lm-eval, and how alike the scores are."""
    result = read("eval")
    lines = [
        f"| {result['model'].split('.')[0]} | questions | tokens for one that differs | questions a second | "
        "processor's time | difference a token | same choices |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        worst = row["difference_a_token"]
        difference = "not a number" if worst is None else f"{worst:.0e}" if worst else "0"
        lines.append(
            f"| {row['package']}, {row['shots']} examples | {row['questions']:,} | {row['shared']:.1f} | "
            f"{row['questions_per_second']:.2f} ({row['ratio']:.2f}×) | {row['processor_seconds']:,.0f} s | "
            f"{difference} | {row['same_choices']:,} |"
        )
    return "\n".join([*lines, "", sources([result])])


def schema() -> str:
    """Steps of an object of 20 fields, and what masks take."""
    result = read("schema")
    lines = [
        "| rows, temperature | tokens | steps, a token each | steps, what must follow together | tokens a second |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in (row for row in result["rows"] if "steps" in row):
        steps = row["steps"]
        lines.append(
            f"| {row['rows']}, {row['temperature']} | {row['tokens']:,} | {steps['masks alone']:,} | "
            f"{steps['together']:,} | {row['ratio']['median']:.1f}× |"
        )
    lines += [
        "",
        "| vocabulary | a mask computed, p99 | computed and applied, p99 | what a step pays, p99 |",
        "|--:|--:|--:|--:|",
    ]
    paid = {row["vocabulary"]: row["paid"]["p99"] for row in result["rows"] if "paid" in row}
    for row in (row for row in result["rows"] if "masks" in row):
        computed, applied = (f"{row[span]['p99']:.0f} µs" for span in ("computed", "applied"))
        lines.append(f"| {row['vocabulary']:,} | {computed} | {applied} | {paid[row['vocabulary']]:.0f} µs |")
    return "\n".join([*lines, "", sources([result])])


def draft() -> str:
    """Tokens a second with a draft model and without, by how many of its guesses hold."""
    result = read("draft")
    lines = [
        "| guesses that held | guesses | tokens a step | tok/s plain | with the draft model | of plain |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        held = "none made" if row["accepted"] is None else f"{row['accepted']:.0%}"
        plain, drafting = (row[f"{way}_tokens_per_second"]["median"] for way in ("plain", "draft"))
        lines.append(
            f"| {held} | {row['drafted']} | {row['tokens_per_step']:.2f} | {plain:.1f} | {drafting:.1f} | "
            f"{row['ratio']['median']:.2f}× |"
        )
    shape = f"{result['layers']} layers, {result['width']} wide; the draft model is the first {result['draft_layers']}"
    return "\n".join([*lines, "", f"{shape}. {sources([result])}"])
