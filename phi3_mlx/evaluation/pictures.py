"""Pictures of an evaluation: what was right, what flipped, and whether the model was as sure as it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import Figure, figures_of
from .samples import choice_logprobs, right_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .paired import PairedFigure

_BARS = 70  # tasks of a picture: more would not be read
_BINS = 10
_FEWEST_SURE = 20  # questions with choices, for a picture of confidence
_BLUE, _RED, _GREY = "#3b6fb6", "#c0504d", "#999999"


def draw_pictures(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The pictures that there is something to show in, as PNG files in `folder`: file names by what they show.

    None without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return {}
    drawn = {}
    figures = _shares(results)
    pairs = _compared(results)
    if figures:
        _save(folder / "figures.png", len(figures), lambda axes: _draw_figures(axes, figures, pairs))
        drawn["figures"] = "figures.png"
    flipping = [pair for pair in pairs.values() if pair.lost or pair.won]
    if flipping:
        _save(folder / "flips.png", len(flipping), lambda axes: _draw_flips(axes, flipping))
        drawn["flips"] = "flips.png"
    sure, right = confidences(results)
    if len(sure) >= _FEWEST_SURE:
        _save(folder / "calibration.png", None, lambda axes: _draw_calibration(axes, sure, right))
        drawn["calibration"] = "calibration.png"
    return drawn


def confidences(results: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of the questions with choices, the likeliest one's share of the probability, and whether it is right."""
    sure, right = [], []
    for samples in results["samples"].values():
        for sample in samples:
            log_p = choice_logprobs(sample)
            if log_p is not None and "acc" in sample["metrics"] and sample["filter"] == samples[0]["filter"]:
                sure.append(float(np.exp(log_p.max())))
                right.append(float(sample["acc"]))
    return np.array(sure), np.array(right)


def bins(sure: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """For each tenth of confidence with questions in it: mean confidence, share of right answers, questions."""
    place = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return [
        (float(sure[here].mean()), float(right[here].mean()), int(here.sum()))
        for number in range(_BINS)
        if (here := place == number).any()
    ]


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: how far confidence and share of right answers are apart, over the tenths."""
    return sum(count * abs(mean - share) for mean, share, count in bins(sure, right)) / len(sure)


def _shares(results: Mapping[str, Any]) -> list[Figure]:
    """Each task's and group's first metric that is a share of right answers."""
    rights = {metric for samples in results["samples"].values() if (metric := right_metric(samples[0])) is not None}
    shown: dict[str, Figure] = {}
    for figure in figures_of(results):
        if figure.metric in rights and figure.task not in shown:
            shown[figure.task] = figure
    return [*shown.values()][:_BARS]


def _compared(results: Mapping[str, Any]) -> dict[str, PairedFigure]:
    """The comparison of each task's first metric of right and wrong."""
    pairs: dict[str, PairedFigure] = {}
    for pair in results.get("against", ()):
        if pair.lost is not None:
            pairs.setdefault(pair.task, pair)
    return dict([*pairs.items()][:_BARS])


def _save(path: Path, rows: int | None, drawing: Any) -> None:
    from matplotlib.figure import Figure as Canvas

    size = (5.5, 5) if rows is None else (7.5, 1.4 + 0.32 * rows)
    canvas = Canvas(figsize=size, layout="constrained")
    drawing(canvas.subplots())
    canvas.savefig(path, dpi=120)


def _draw_figures(axes: Axes, figures: Sequence[Figure], pairs: Mapping[str, PairedFigure]) -> None:
    rows = np.arange(len(figures))
    spans = [0.0 if figure.interval is None else figure.interval for figure in figures]
    if pairs:
        before = [pairs[figure.task].before if figure.task in pairs else np.nan for figure in figures]
        axes.scatter(before, rows, marker="|", s=160, color=_GREY, label="before", zorder=3)
    values = [figure.value for figure in figures]
    axes.errorbar(values, rows, xerr=spans, fmt="o", color=_BLUE, capsize=3, label="this model, 95 %")
    axes.set_yticks(rows, [_name(f"{figure.task} ({figure.questions:,})") for figure in figures])
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of right answers")
    axes.grid(axis="x", alpha=0.3)
    if pairs:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _draw_flips(axes: Axes, pairs: Sequence[PairedFigure]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows = np.arange(len(pairs))
    lost, won = ([len(places or ()) for places in side] for side in zip(*((p.lost, p.won) for p in pairs), strict=True))
    left = axes.barh(rows, [-count for count in lost], height=0.6, color=_RED, label="lost")
    right = axes.barh(rows, won, height=0.6, color=_BLUE, label="won")
    axes.bar_label(left, [str(count) for count in lost], padding=3, fontsize=8)
    axes.bar_label(right, [str(count) for count in won], padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(rows, [_name(pair.task) for pair in pairs])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    most = 1.15 * max(1, *lost, *won)
    axes.set_xlim(-most, most)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))
    axes.set_xlabel("questions that only one of the models got right")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _draw_calibration(axes: Axes, sure: np.ndarray, right: np.ndarray) -> None:
    means, shares, counts = zip(*bins(sure, right), strict=True)
    errors = [1.96 * np.sqrt(share * (1 - share) / count) for share, count in zip(shares, counts, strict=True)]
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1)
    axes.errorbar(means, shares, yerr=errors, fmt="o-", color=_BLUE, capsize=3)
    for mean, share, count in zip(means, shares, counts, strict=True):
        axes.annotate(f"{count:,}", (mean, share), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set_xlim(0, 1.08)  # room for the last number
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence: the likeliest choice's share of the probability")
    axes.set_ylabel("share of right answers")
    axes.set_title(f"{len(sure):,} questions, calibration error {calibration_error(sure, right):.3f}", fontsize=10)


def _name(text: str) -> str:
    """A task's name as a label: matplotlib would read formulas between dollar signs."""
    return (text if len(text) <= 45 else f"{text[:44]}…").replace("$", r"\$")
