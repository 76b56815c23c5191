"""Differences between two arms with their intervals, and what they say of a hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
NEGLIGIBLE = 0.01  # bits per character


def by_seeds(differences: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of differences that are paired by seed, by Student's t."""
    from scipy import stats

    n = len(differences)
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / n**0.5
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half


def share(items: np.ndarray) -> float:
    """What the items (n, 2) amount to: all that was got of all that there was."""
    got, of = items.sum(axis=0)
    return float(got / of)


def by_texts(one: Sequence[np.ndarray], other: Sequence[np.ndarray], draws: int) -> Interval:
    """The 95 % interval of the difference between two arms over texts drawn again, the same for both.

    Of each arm the items (n, 2) by seed, whose figures are averaged.
    """
    rng = np.random.default_rng(0)
    n = len(one[0])
    drawn = []
    for _ in range(draws):
        chosen = rng.integers(n, size=n)
        means = [np.mean([share(items[chosen]) for items in arm]) for arm in (one, other)]
        drawn.append(means[0] - means[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def side(interval: Interval) -> int:
    """-1 or 1: the side of 0 on which all of the interval is; 0 if it holds 0."""
    low, high = interval
    return -1 if high < 0 else 1 if low > 0 else 0


def verdict(mean: float, intervals: Sequence[Interval], expected: int, negligible: float = 0.0) -> str:
    """What two intervals say of a hypothesis that expects the difference on a side of 0, or, with 0, nowhere."""
    sides = {side(interval) for interval in intervals}
    if abs(mean) < negligible:
        return "held" if expected == 0 else "negligible"
    if len(sides) > 1:
        return "undecided"
    (found,) = sides
    if found == expected:
        return "held"
    return "undecided" if found == 0 else "contradicted"
