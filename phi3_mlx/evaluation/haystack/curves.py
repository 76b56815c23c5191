"""Scores over length, a curve for each cache and rule: figures with intervals, what a setting costs, the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..figures import drawn_bounds

_RESAMPLES_OF_CURVES = 5_000
_CURVES_SEED = 1234
_ASIDE = 0.03  # doublings of the length between the points of two curves


class Setting(NamedTuple):
    """How a model reads: LongRoPE's rule, and how its cache is quantized ("0", "8", "8/4")."""

    rule: str
    cache: str


CurveScores = Mapping[tuple[Setting, int, str], Sequence[float]]  # by setting, length and task: a score for each sample


def figures_over_length(scores: CurveScores) -> list[dict[str, Any]]:
    """For each setting and length the mean over its tasks, with a 95 % interval, and each task's mean.

    `cost` is how much lower it is than with the first setting, on the same samples; samples are drawn again within
    each task.
    """
    settings = list(dict.fromkeys(setting for setting, _, _ in scores))
    rows = []
    for setting in settings:
        for length in dict.fromkeys(length for _, length, _ in scores):
            tasks = {task: np.array(v) for (s, n, task), v in scores.items() if (s, n) == (setting, length)}
            if not tasks:
                continue
            row = {"rule": setting.rule, "cache": setting.cache, "length": length, **_mean(list(tasks.values()))}
            row["tasks"] = {task: _mean([values]) for task, values in tasks.items()}
            first = settings[0]
            if setting != first and all((first, length, task) in scores for task in tasks):
                row["cost"] = _mean([np.array(scores[first, length, task]) - values for task, values in tasks.items()])
            rows.append(row)
    return rows


def _mean(tasks: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean of the tasks' means, with `drawn_bounds`; each task's samples are drawn again apart."""
    rng = np.random.default_rng(_CURVES_SEED)
    drawn = [values[rng.integers(0, len(values), (_RESAMPLES_OF_CURVES, len(values)))].mean(axis=1) for values in tasks]
    value = float(np.mean([values.mean() for values in tasks]))
    return {"value": value, **drawn_bounds(np.mean(drawn, axis=0)), "samples": sum(map(len, tasks))}


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """The curves as a PNG file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return False
    canvas = Canvas(figsize=(6.5, 4.8), layout="constrained")
    axes = canvas.subplots()
    settings = list(dict.fromkeys((row["rule"], row["cache"]) for row in rows))
    for number, (rule, cache) in enumerate(settings):
        mine = [row for row in rows if (row["rule"], row["cache"]) == (rule, cache)]
        aside = 2 ** (_ASIDE * (number - (len(settings) - 1) / 2))  # so that equal curves are both seen
        lengths, values = [aside * row["length"] for row in mine], [100 * row["value"] for row in mine]
        errors = [[0 if r[end] is None else 100 * abs(r["value"] - r[end]) for r in mine] for end in ("low", "high")]
        label = f"{rule}, {'cache not quantized' if cache == '0' else f'cache of {cache} bits'}"
        axes.errorbar(lengths, values, yerr=errors, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens of the prompt with its answer")
    axes.set_ylabel("retrieved, %")
    axes.set_title("RULER-like tasks")
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    canvas.savefig(path, dpi=120)
    return True
