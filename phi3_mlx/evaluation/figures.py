"""The figures of an evaluation: metrics as a table has them, and bounds of what was drawn again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_NO_WIDTH = 1e-9  # between figures that are equal but for rounding


class Figure(NamedTuple):
    """A metric of a task or a group. `filtered`: how answers are taken from texts; `error`: standard, if known."""

    task: str
    metric: str
    filtered: str
    shots: int | None
    questions: int
    value: float
    error: float | None

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval."""
        return None if self.error is None else 1.96 * self.error


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    """The metrics in what `evaluate` returned: groups first, then tasks, in lm-eval's order."""
    groups = results.get("groups") or {}
    order = [*reversed([*groups]), *(name for name in results["results"] if name not in groups)]
    figures = []
    for name in order:
        told = groups[name] if name in groups else results["results"][name]
        for key, value in told.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = told.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and 0 < error < math.inf  # 0: all were right, or none
            figures.append(
                Figure(
                    name,
                    metric,
                    filtered,
                    results["n-shot"].get(name),
                    int(told["sample_len"]),
                    float(value),
                    float(error) if known else None,
                )
            )
    return figures


def drawn_bounds(drawn: np.ndarray) -> dict[str, float | None]:
    """`low` and `high` of 95 % of a figure's draws; None where all are equal.

    They are of a single question, or where all are right, or none: then no width would be no certainty.
    """
    if np.ptp(drawn) < _NO_WIDTH:
        return {"low": None, "high": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}
