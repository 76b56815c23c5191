"""A linear probe: whether a place's values tell two kinds of prompts apart, on prompts that it was not fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..values import listed, number, refusal, shown, whole

_NEWTON_STEPS, _SETTLED = 100, 1e-9  # of Newton's method: at most, and how small its last may be


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """Logistic regression on vectors: `weights` (width,) float32 and a `bias`, in the units of what it was fitted to.

    `accuracy` is the share of examples that were right, each told by a fit without it; `chance` is that of always
    guessing the more frequent kind.
    """

    weights: mx.array
    bias: float
    accuracy: float
    chance: float

    def __call__(self, activations: mx.array) -> mx.array:
        """How likely vectors (..., width) are of the kind 1: (...) probabilities."""
        return mx.sigmoid(activations.astype(mx.float32) @ self.weights + self.bias)

    def __repr__(self) -> str:
        return f"<Probe: {self.weights.size:,} weights, accuracy {self.accuracy:.0%}, chance {self.chance:.0%}>"


def linear_probe(
    activations: mx.array,
    labels: Sequence[int],
    *,
    groups: Sequence[object] | None = None,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Fit a probe to `activations` (examples, width), of which `labels` says 0 or 1 (or False and True).

    Its accuracy is of examples held out, in `folds` parts in turn. Those of one of `groups`, such as the two prompts of
    a pair, are held out together: what they have in common would give the answer away. `penalty` times half the
    squared weights is added to the loss (scikit-learn's 1 / C), of numbers that have variance 1. Raises OptionError for
    other labels than two kinds, or too few groups for the folds.
    """
    x, kinds = _examples(activations, labels)
    parts, strength = whole(folds, "folds"), number(penalty, "penalty")
    if not 0 < strength < np.inf:
        raise OptionError(f"penalty is {strength:g}; give a number over 0")
    names = [*range(len(kinds))] if groups is None else listed(groups)
    if names is None or len(names) != len(kinds):
        raise refusal(groups, "groups", f"{len(kinds)} names, one an example")
    fold = _folds(names, kinds, parts, whole(seed, "seed"))
    right = 0
    for part in range(parts):
        held = fold == part
        if held.all() or len(np.unique(kinds[~held])) < 2:
            raise OptionError(f"folds {parts} leave one kind alone to fit to; give more examples, or fewer folds")
        weights, bias = _fitted(x[~held], kinds[~held], strength)
        right += int(((x[held] @ weights + bias > 0) == kinds[held]).sum())
    weights, bias = _fitted(x, kinds, strength)
    share = kinds.mean()
    return Probe(mx.array(weights.astype(np.float32)), bias, right / len(kinds), float(max(share, 1 - share)))


def _examples(activations: mx.array, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(examples, width) and whether each is of kind 1."""
    if not isinstance(activations, mx.array) or activations.ndim != 2 or not activations.size:
        raise refusal(activations, "activations", "an array (examples, width)")
    x = np.array(activations.astype(mx.float32)).astype(np.float64)
    if not np.isfinite(x).all():
        raise OptionError("activations has values that are not finite")
    kinds = listed(labels)
    if kinds is None or len(kinds) != len(x) or any(kind not in (0, 1) for kind in kinds) or len({*kinds}) < 2:
        raise OptionError(f"labels is {shown(labels)}; expected {len(x)} of 0 and 1, both among them")
    return x, np.array(kinds).astype(bool)


def _folds(names: Iterable[object], kinds: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """The part of each example: groups drawn by the seed, those of each kind shared out evenly."""
    first: dict[object, bool] = {}
    for name, kind in zip(names, kinds, strict=True):
        first.setdefault(name, bool(kind))
    if not 2 <= parts <= len(first):
        raise OptionError(f"folds is {parts}; there are {len(first)} groups of examples, so give 2 to {len(first)}")
    drawn = [[*first][place] for place in np.random.default_rng(seed).permutation(len(first))]
    drawn.sort(key=lambda name: first[name])
    part = {name: place % parts for place, name in enumerate(drawn)}
    return np.array([part[name] for name in names])


def _fitted(x: np.ndarray, kinds: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The weights and bias of least penalized loss, by Newton's method among the examples' own directions.

    No other direction can lower the loss, so there are as many numbers to fit as examples, whatever the width.
    """
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation == 0] = 1
    left, lengths, axes = np.linalg.svd((x - mean) / deviation, full_matrices=False)
    z = np.concatenate([left * lengths, np.ones((len(x), 1))], axis=1)  # the last number is the bias
    penalties = np.append(np.full(len(lengths), penalty), 0.0)
    signs = np.where(kinds, 1.0, -1.0)

    def loss(fit: np.ndarray) -> float:
        return float(np.logaddexp(0, -signs * (z @ fit)).sum() + (penalties * fit**2).sum() / 2)

    fit = np.zeros(z.shape[1])
    for _ in range(_NEWTON_STEPS):
        likely = np.exp(-np.logaddexp(0, -(z @ fit)))
        gradient = z.T @ (likely - kinds) + penalties * fit
        curvature = (z.T * (likely * (1 - likely))) @ z + np.diag(penalties)
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        while loss(fit - step) > loss(fit) and np.abs(step).max() > _SETTLED:
            step /= 2
        fit = fit - step
        if np.abs(step).max() <= _SETTLED:
            break
    weights = axes.T @ fit[:-1] / deviation
    return weights, float(fit[-1] - mean @ weights)
