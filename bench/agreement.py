"""How close two packages come to the reference, as cells of a table: on a terminal and in the pages."""

from __future__ import annotations

from typing import Any

STEPS = 64  # tokens of the generation


def cells(row: dict[str, Any], package: str) -> tuple[str, str]:
    """A row's two cells for a package: the difference, the agreement."""
    found = row[package]
    if "equal_tokens" in found:
        return "", f"{found['equal_tokens']} of {STEPS} tokens"
    # One position of thousands that disagrees must not read as 100 %.
    percent = int(found["greedy_agreement"] * 1000) / 10
    return f"{found['max_difference']:.1e}", f"{percent:g} %"


HEAD = ("model", "case", "tokens", "phi3-mlx max Δ", "phi3-mlx greedy", "mlx-lm max Δ", "mlx-lm greedy")


def lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's rows as text."""
    return [
        (row["model"], row["case"], f"{row['tokens']:,}", *cells(row, "phi3-mlx"), *cells(row, "mlx-lm"))
        for row in rows
    ]
