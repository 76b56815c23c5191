"""Rounding to the K types: 256 values share one or two float16 scales, and 16 or 32 of them integers that multiply it.

Two families (github.com/ggml-org/ggml, ggml-common.h): "offset" types store a step and a minimum for each group,
value = d * step * q - dmin * minimum with q from 0; "centred" ones a step alone, value = d * step * q with q around 0.

A group's step and minimum are searched for: for steps somewhat smaller and larger than its range asks for, round, then
solve for the step and minimum that fit these q best (weighted least squares), and keep the best. Steps and minima are
rounded to integers next, q again with what they have become, and in the end d and dmin are solved for all 256 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .kblocks import PACKERS

BLOCK_VALUES = 256


@dataclass(frozen=True)
class _Shape:
    """`group` values share a step; q has `levels` values, steps (and minima) go to `most_steps`, below zero if centred.

    `search`: by how much the number of levels is changed to find a group's step.
    """

    group: int
    levels: int
    most_steps: int
    search: np.ndarray


_OFFSET = {
    "Q2_K": _Shape(16, 4, 15, np.arange(-0.9, 1.5, 0.1)),
    "Q4_K": _Shape(32, 16, 63, np.arange(-3.5, 1.1, 0.25)),
    "Q5_K": _Shape(32, 32, 63, np.arange(-3.5, 1.1, 0.25)),
}
_CENTRED = {
    "Q3_K": _Shape(16, 8, 32, np.arange(-1.5, 1.1, 0.1)),
    "Q6_K": _Shape(16, 64, 128, np.arange(-1.5, 1.1, 0.1)),
}
K_TYPES = (*_OFFSET, *_CENTRED)


def k_blocks(values: mx.array, kind: str, importance: mx.array | None = None) -> np.ndarray:
    """Rows (n, width) of finite floats as blocks (n * width / 256, bytes) of a K type.

    `importance` (n, width) says how much an error counts; in any case larger values count somewhat more.
    """
    x = values.astype(mx.float32).reshape(-1, BLOCK_VALUES)
    mean = mx.mean(x * x, axis=-1, keepdims=True)
    if importance is None:
        weight = mx.sqrt(mean) + mx.abs(x)
    else:
        weight = importance.reshape(x.shape) * mx.sqrt(2 * mean + x * x)
    # Sums stay far from float32's limits, whatever the scale of values and importance.
    weight = weight / mx.maximum(mx.mean(weight, axis=-1, keepdims=True), 1e-30) + 1e-6
    parts = _offset_parts(x, weight, _OFFSET[kind]) if kind in _OFFSET else _centred_parts(x, weight, _CENTRED[kind])
    mx.eval(parts)
    return PACKERS[kind](*map(np.array, parts))


def _offset_parts(x: mx.array, weight: mx.array, shape: _Shape) -> list[mx.array]:
    """q (n, 256) from 0, integer steps and minima (n, groups), and d and dmin (n, 1) as float16 holds them."""
    groups = (len(x), -1, shape.group)
    grouped, weights = x.reshape(groups), weight.reshape(groups)
    steps, minima = _fit_with_offset(grouped, weights, shape)
    d, dmin = (_float16(part.max(axis=-1, keepdims=True) / shape.most_steps) for part in (steps, minima))
    whole_steps, whole_minima = (
        mx.clip(mx.round(_divided(part, unit)), 0, shape.most_steps) for part, unit in ((steps, d), (minima, dmin))
    )

    def rounded(d: mx.array, dmin: mx.array) -> mx.array:
        step, minimum = (d * whole_steps)[..., None], (dmin * whole_minima)[..., None]
        return mx.clip(mx.round(_divided(grouped + minimum, step)), 0, shape.levels - 1)

    def error(d: mx.array, dmin: mx.array, q: mx.array) -> mx.array:
        off = (d * whole_steps)[..., None] * q - (dmin * whole_minima)[..., None] - grouped
        return mx.sum(weights * off * off, axis=(-2, -1))[:, None]

    q = rounded(d, dmin)
    # d and dmin for these q: the two equations of the least squares.
    a, b = whole_steps[..., None] * q, -mx.broadcast_to(whole_minima[..., None], q.shape)
    aa, ab, bb, ax, bx = (
        mx.sum(weights * left * right, axis=(-2, -1))[:, None]
        for left, right in ((a, a), (a, b), (b, b), (a, grouped), (b, grouped))
    )
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    fitted_d = mx.where(solvable, _divided(bb * ax - ab * bx, determinant), d)
    fitted_dmin = mx.where(solvable, _divided(aa * bx - ab * ax, determinant), dmin)
    fitted_d, fitted_dmin = _float16(mx.maximum(fitted_d, 0)), _float16(mx.maximum(fitted_dmin, 0))
    fitted_q = rounded(fitted_d, fitted_dmin)
    better = error(fitted_d, fitted_dmin, fitted_q) < error(d, dmin, q)
    q = mx.where(better[..., None], fitted_q, q)
    d, dmin = mx.where(better, fitted_d, d), mx.where(better, fitted_dmin, dmin)
    return [
        q.reshape(x.shape).astype(mx.uint8),
        whole_steps.astype(mx.uint8),
        whole_minima.astype(mx.uint8),
        d.astype(mx.float16),
        dmin.astype(mx.float16),
    ]


def _fit_with_offset(x: mx.array, weight: mx.array, shape: _Shape) -> tuple[mx.array, mx.array]:
    """The step and the minimum, 0 or more, of each group of x (n, groups, group); (n, groups) each."""
    low = mx.minimum(x.min(axis=-1), 0)
    width = x.max(axis=-1) - low
    total, weighted = mx.sum(weight, axis=-1), weight * x
    first = mx.sum(weighted, axis=-1)
    second = mx.sum(weighted * x, axis=-1)
    best = mx.full(low.shape, mx.inf)
    best_step, best_low = width / (shape.levels - 1), low
    for change in shape.search:
        inverse = _divided(mx.array(shape.levels - 1 + float(change)), width)
        q = mx.clip(mx.round(inverse[..., None] * (x - low[..., None])), 0, shape.levels - 1)
        wq = weight * q
        q1, q2, xq = (mx.sum(part, axis=-1) for part in (wq, wq * q, weighted * q))
        determinant = total * q2 - q1 * q1
        step = _divided(total * xq - first * q1, determinant)
        minimum = _divided(q2 * first - q1 * xq, determinant)
        positive = minimum > 0
        step = mx.where(positive, _divided(xq, q2), step)
        minimum = mx.where(positive, 0, minimum)
        error = second + step * step * q2 + minimum * minimum * total
        error = error + 2 * (step * minimum * q1 - step * xq - minimum * first)
        better = (error < best) & (determinant > 0) & (step > 0)
        best = mx.where(better, error, best)
        best_step, best_low = mx.where(better, step, best_step), mx.where(better, minimum, best_low)
    return best_step, -best_low


def _centred_parts(x: mx.array, weight: mx.array, shape: _Shape) -> list[mx.array]:
    """q (n, 256) around 0, integer steps (n, groups) around 0, and d (n, 1) as float16 holds it."""
    groups = (len(x), -1, shape.group)
    grouped, weights = x.reshape(groups), weight.reshape(groups)
    steps = _fit_centred(grouped, weights, shape)
    largest = mx.take_along_axis(steps, mx.argmax(mx.abs(steps), axis=-1, keepdims=True), axis=-1)
    d = _float16(largest / -shape.most_steps)  # the range reaches one further below zero
    whole_steps = mx.clip(mx.round(_divided(steps, d)), -shape.most_steps, shape.most_steps - 1)

    def rounded(d: mx.array) -> mx.array:
        half = shape.levels // 2
        return mx.clip(mx.round(_divided(grouped, (d * whole_steps)[..., None])), -half, half - 1)

    def error(d: mx.array, q: mx.array) -> mx.array:
        off = (d * whole_steps)[..., None] * q - grouped
        return mx.sum(weights * off * off, axis=(-2, -1))[:, None]

    q = rounded(d)
    a = whole_steps[..., None] * q
    aa, ax = (mx.sum(weights * a * other, axis=(-2, -1))[:, None] for other in (a, grouped))
    fitted_d = _float16(mx.where(aa > 0, _divided(ax, aa), d))
    fitted_q = rounded(fitted_d)
    better = error(fitted_d, fitted_q) < error(d, q)
    q = mx.where(better[..., None], fitted_q, q)
    d = mx.where(better, fitted_d, d)
    return [q.reshape(x.shape).astype(mx.int8), whole_steps.astype(mx.int32), d.astype(mx.float16)]


def _fit_centred(x: mx.array, weight: mx.array, shape: _Shape) -> mx.array:
    """The step, of either sign, of each group of x (n, groups, group); (n, groups)."""
    half = shape.levels // 2
    largest = mx.take_along_axis(x, mx.argmax(mx.abs(x), axis=-1, keepdims=True), axis=-1)[..., 0]
    best_step, best = largest / -half, mx.full(largest.shape, -mx.inf)
    weighted = weight * x
    for change in shape.search:
        inverse = _divided(mx.array(-(half + float(change))), largest)
        q = mx.clip(mx.round(inverse[..., None] * x), -half, half - 1)
        q2, xq = mx.sum(weight * q * q, axis=-1), mx.sum(weighted * q, axis=-1)
        gained = _divided(xq * xq, q2)  # of the weighted squares, what the fit explains
        better = gained > best
        best, best_step = mx.where(better, gained, best), mx.where(better, _divided(xq, q2), best_step)
    return best_step


def _divided(a: mx.array, b: mx.array) -> mx.array:
    """a / b, and 0 where b is 0."""
    return mx.where(b == 0, 0, a / mx.where(b == 0, 1, b))


def _float16(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(mx.float32)
