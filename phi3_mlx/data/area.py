"""How well scores part good from bad: the area under the ROC curve, with its interval."""

from __future__ import annotations

import math

import numpy as np

AREA_OF_CHANCE = 0.5  # an area that says nothing
_DEVIATIONS_95 = 1.959964  # standard deviations, 95 %


def area_under_curve(scores: np.ndarray, good: np.ndarray) -> float:
    """How often a good one has the higher score of a pair, equal ones half. scores (n,), good (n,) of bool.

    NaN where there are none of a kind.
    """
    ordered, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    del ordered
    ranks = (counts.cumsum() - (counts - 1) / 2)[places]
    positive = int(good.sum())
    negative = len(good) - positive
    if not positive or not negative:
        return math.nan
    return float((ranks[good].sum() - positive * (positive + 1) / 2) / positive / negative)


def area_interval(area: float, positive: int, negative: int) -> tuple[float, float]:
    """The 95 % interval of an area, by how many good and bad ones it was measured on.

    Newcombe's fifth method (2006), which solves Hanley and McNeil's variance for the area itself, so that an area of 1
    has an interval too.
    """
    areas = np.linspace(0, 1, 20_001)
    mean = (positive + negative) / 2 - 1
    spread = areas * (1 - areas) * (1 + mean * ((1 - areas) / (2 - areas) + areas / (1 + areas)))
    inside = areas[np.abs(area - areas) <= _DEVIATIONS_95 * np.sqrt(spread / (positive * negative))]
    return min(area, float(inside[0])), max(area, float(inside[-1]))
