"""The tables of what need not be computed again, in Markdown: the tokens that a schema leaves no choice of."""

from __future__ import annotations

from .published import read, sources


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
