"""The tables of what need not be computed again, in Markdown.

Prompts that begin alike, and the tokens that a schema leaves no choice of.
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
