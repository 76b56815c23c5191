"""What a packed layer's matrices should be, before they are rounded: such that outputs stay the source's.

A packed layer gets inputs X' that the layers before it have changed, the source's layer X. The matrix that brings X'
nearest to the source's outputs X W^T is W* = W + W E (H + d I)^-1 with H = X'^T X' and E = (X - X')^T X' (GPTAQ, Li et
al. 2025, arXiv 2504.02692). Where outputs are added to the residual stream, R in the source and R' in the packed model,
it is their sum that should stay: W* = W + (W E + (R - R')^T X') (H + d I)^-1. All sums then weight a token by 1/|R|^2,
because norms divide by that length, and a window's first token may be hundreds of times as long as others. The damping
d keeps W* from learning the text by heart: it is the one whose W* does best on rows of the text that W* was not made
from, and if none of them does, W stays.

Rounding has a damping of its own. With little of it the errors of columns make up for each other on the text that was
read, and less so on any other; which is best is seen on the rows held out, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import mlx.core as mx

from .gptq import dequantized_matrix, gptq, inverse_factor
from .layerwise import Inputs

DAMPINGS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # of the mean of the Hessian's diagonal
HELD_OUT = 4  # every fourth row of the text chooses the dampings
_LEAST_SQUARE = 1e-4  # of the mean of all tokens' streams: shorter ones weigh no more
_TRIED_ROWS, _TRIED_SWEEPS = 64, 1  # of a matrix at least, by which rounding's damping is chosen
_USUAL_ROUNDING = 4.0  # times inputs over tokens: where the search for rounding's damping begins


@dataclass(frozen=True)
class Moments:
    """Sums over the inputs of a matrix: the packed ones' squares (width, width), and those of how far they moved
    with the packed ones, (X - X')^T X'; `tokens` were counted.

    `owed`: (R - R')^T X' (outputs, width), what outputs have to make up for in the residual stream that they are added
    to; 0 where they are not. `whole`: |R + X W^T|^2, and `inherited`: |R - R' + (X - X') W^T|^2, what the layers before
    cost; 0 where no W was given.
    """

    hessian: mx.array
    shift: mx.array
    owed: mx.array
    tokens: int
    whole: mx.array
    inherited: mx.array

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.hessian + other.hessian,
            self.shift + other.shift,
            self.owed + other.owed,
            self.tokens + other.tokens,
            self.whole + other.whole,
            self.inherited + other.inherited,
        )

    def __rmul__(self, factor: float) -> Moments:
        return Moments(
            factor * self.hessian,
            factor * self.shift,
            factor * self.owed,
            round(factor * self.tokens),
            factor * self.whole,
            factor * self.inherited,
        )

    def error(self, weight: mx.array, other: mx.array) -> float:
        """|R + X W^T - R' - X' V^T| / |R + X W^T| of `weight` W and what replaced it, `other` V (outputs, inputs)."""
        whole, worse = float(self.whole), self.worse(other - weight, self.wanted(weight))
        return math.sqrt(max(0.0, float(self.inherited) + worse) / whole) if whole else 0.0

    def worse(self, change: mx.array, wanted: mx.array) -> float:
        """How much a `change` of rows of a weight adds to the squared errors of outputs that lack what is `wanted`."""
        return float((change * (change @ self.hessian) - 2 * change * wanted).sum())

    def wanted(self, weight: mx.array) -> mx.array:
        """What `weight` (outputs, inputs) lacks, with the packed inputs: (R - R' + (X - X') W^T)^T X'."""
        return weight @ self.shift + self.owed


def moments_of(inputs: Iterable[Sequence[Inputs]], weights: Sequence[mx.array] = ()) -> list[Moments]:
    """The moments of each of several matrices: every item of `inputs` has one pair for each of them.

    `weights`: the source's matrices (outputs, inputs), for `whole` and `inherited`.
    """
    totals: list[Moments] = []
    for parts in inputs:
        added = [_moments(part, weight) for part, weight in zip(parts, weights or repeat(None), strict=False)]
        totals = [total + more for total, more in zip(totals, added, strict=True)] if totals else added
        mx.eval([(total.hessian, total.shift, total.owed, total.whole, total.inherited) for total in totals])
    return totals


def _moments(inputs: Inputs, weight: mx.array | None) -> Moments:
    source, packed = inputs.source.astype(mx.float32), inputs.packed.astype(mx.float32)
    owed = whole = inherited = mx.array(0.0)
    if inputs.stream is not None:
        before, after = inputs.stream
        square = (before**2).mean(axis=-1, keepdims=True)
        share = mx.rsqrt(mx.maximum(square, _LEAST_SQUARE * square.mean() + 1e-20))
        source, packed, before, after = (rows * share for rows in (source, packed, before, after))
    moved = source - packed
    if weight is not None:
        whole, inherited = source @ weight.T, moved @ weight.T
    if inputs.stream is not None:
        drift = before - after
        owed = drift.T @ packed
        if weight is not None:
            whole, inherited = whole + before, inherited + drift
    return Moments(packed.T @ packed, moved.T @ packed, owed, len(packed), (whole**2).sum(), (inherited**2).sum())


@dataclass(frozen=True)
class Desired:
    """A matrix to round, float32; `damping` is what it was made with, None where it is the source's own."""

    weight: mx.array
    damping: float | None


def target_of(weight: mx.array, fitted: Moments, held_out: Moments) -> Desired:
    """The best target for `weight` (outputs, inputs): dampings are tried on `fitted`, and judged on `held_out`."""
    weight = weight.astype(mx.float32)
    wanted, unseen = fitted.wanted(weight), held_out.wanted(weight)

    def worse(damping: float) -> float:
        return held_out.worse(_solved(wanted, fitted.hessian, damping), unseen)

    damping, loss = _least(DAMPINGS, worse)
    if loss >= 0:
        return Desired(weight, None)
    everything = fitted + held_out
    return Desired(weight + _solved(everything.wanted(weight), everything.hessian, damping), damping)


def _solved(wanted: mx.array, hessian: mx.array, damping: float) -> mx.array:
    """The change Z of a weight that Z (H + d I) = `wanted` says."""
    factor = inverse_factor(hessian, damping)
    return (wanted @ factor.T) @ factor


def usual_damping(inputs: int, tokens: int) -> float:
    """The damping that rounding a matrix of that many inputs for a text mostly has."""
    usual = _USUAL_ROUNDING * inputs / max(tokens, 1)
    return min(DAMPINGS, key=lambda damping: abs(math.log(damping / usual)))


def rounding_damping(
    weight: mx.array,
    target: mx.array,
    fitted: Moments,
    held_out: Moments,
    packing: Mapping[str, Any],
    dtype: mx.Dtype,
) -> float:
    """The damping with which GPTQ rounds `target` to the best stand-in for `weight`: tried and judged as a target's.

    Some rows (outputs) of the matrix are enough to tell. Where nothing is held out, it is the usual one for the text.
    """
    usual = usual_damping(weight.shape[-1], fitted.tokens)
    if not held_out.tokens:
        return usual
    some = slice(None, None, max(1, len(weight) // _TRIED_ROWS))
    rows, tried, unseen = weight[some].astype(mx.float32), target[some], held_out.wanted(weight)[some]

    def worse(damping: float) -> float:
        parts = gptq(tried, fitted.hessian, packing, dtype, _TRIED_SWEEPS, damping)
        return held_out.worse(dequantized_matrix(parts, packing) - rows, unseen)

    return _least(DAMPINGS, worse, DAMPINGS.index(usual))[0]


def _least(dampings: Sequence[float], loss: Callable[[float], float], start: int = 0) -> tuple[float, float]:
    """The damping of least loss and that loss: a minimum beside which both neighbours lose more, looked for from
    `start` on, first among smaller dampings."""
    best, at = loss(dampings[start]), start
    for way in (1, -1):
        while 0 <= at + way < len(dampings) and (now := loss(dampings[at + way])) < best:
            best, at = now, at + way
        if at != start:
            break
    return dampings[at], best
