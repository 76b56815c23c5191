"""The tables of what llama.cpp makes of exported files, in Markdown; as in `tables`, nothing is measured here."""

from __future__ import annotations

from typing import Any

from .published import read, sources


def exported_types() -> str:
    """What each type costs."""
    result = read("export")
    lines = ["| `--type` | bits a weight | KL, nats | largest difference | same choice |", "|---|--:|--:|--:|--:|"]
    lines += [f"| `{row['type']}` | {row['bits_per_weight']:.2f} | {_cells(row)} |" for row in result["rows"]]
    return "\n".join([*lines, "", f"{result['tokens']} tokens; {_source(result)}"])


def exported_longrope() -> str:
    """Prompts and answers on both sides of the original length."""
    result = read("export-longrope")
    lines = [
        "| | tokens | `-c` | KL, nats | largest difference | same choice | greedy tokens alike |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        alike = f"{row['alike']} of {result['greedy']}"
        lines.append(f"| {row['prompt']} | {row['tokens']:,} | {row['context']:,} | {_cells(row)} | {alike} |")
    return "\n".join([*lines, "", _source(result)])


def exported_experts() -> str:
    """llama.cpp's two errors with experts, apart and together."""
    result = read("export-moe")
    lines = ["| | KL, nats | largest difference | same choice |", "|---|--:|--:|--:|"]
    lines += [f"| {row['what']} | {_cells(row)} |" for row in result["rows"]]
    return "\n".join([*lines, "", f"{result['tokens']} tokens; {_source(result)}"])


def _cells(row: dict[str, Any]) -> str:
    return f"{row['kl']:.1e} | {row['largest_difference']:.1e} | {row['same_choice']:.1%}"


def _source(result: dict[str, Any]) -> str:
    return f"{result['oracle']}; {sources([result])}"
