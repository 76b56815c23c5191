"""The table of who tells good texts from bad, in Markdown."""

from __future__ import annotations

from .published import read, sources

_TASKS = {"disorder": "words in disorder", "onestop": "for beginners or advanced readers"}


def judges() -> str:
    """The areas under the ROC curve of ratings and filters, with their intervals."""
    result = read("data")
    lines = ["| texts | who judges | by | AUC | 95 % interval |", "|---|---|---|--:|--:|"]
    for row in result["rows"]:
        judge = row["judge"].split(".")[0]
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {_TASKS[row['task']]} | {judge} | {row['by']} | {row['auc']:.3f} | {interval} |")
    sizes = "; ".join(f"{_TASKS[task]}: {count['unseen']} unseen texts" for task, count in result["texts"].items())
    return "\n".join([*lines, "", f"{sizes[0].upper()}{sizes[1:]}. {sources([result])}"])
