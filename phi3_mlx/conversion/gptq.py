"""GPTQ: rounding that makes up for its own error (Frantar et al. 2023, arXiv 2210.17323), in MLX's affine format.

A weight's columns are rounded one after another; what rounding a column does to the layer's outputs on a text is
compensated by changing the columns that are still to come. Then integers, scales and biases are fitted once more
(`refit`), each to all the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..store.finite import is_finite
from .refit import Rounded, in_turn, refitted

SWEEPS = 4  # over the groups of a rounded matrix
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
ROWS_AT_ONCE = 8192  # of a weight at a time: they do not depend on each other
_SHRINKS = tuple(1 - 0.05 * i for i in range(9))  # of a group's range, tried for the least error
_TRIED_TOGETHER = 3  # of them: fewer and larger operations, in little memory
_NOT_FINITE = "the model's weights or activations are not finite, which GPTQ needs; use method='round'"


def hessian_of(inputs: Iterable[mx.array]) -> mx.array:
    """The sum of x x^T over inputs (tokens, width), float32 (width, width)."""
    total = mx.array(0.0)
    for part in inputs:
        floats = part.astype(mx.float32)
        total = total + floats.T @ floats
        mx.eval(total)
    return total


def gptq(
    weight: mx.array,
    hessian: mx.array,
    packing: Mapping[str, Any],
    dtype: mx.Dtype,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[mx.array]:
    """A weight (outputs, inputs) packed for inputs of that `hessian`: weight, scales and biases, these in `dtype`.

    `sweeps`: how often what was rounded is refitted. `damping`, of the mean of the Hessian's diagonal, is added to that
    diagonal: the larger, the less errors make up for each other. CheckpointError where weight or hessian is not finite.
    """
    columns = round_columns(weight, inverse_factor(hessian, damping), packing, dtype)
    return refit(weight, hessian, columns, packing, sweeps, damping)


def round_columns(weight: mx.array, factor: mx.array, packing: Mapping[str, Any], dtype: mx.Dtype) -> list[mx.array]:
    """`gptq` without its sweeps, by the `inverse_factor` of its Hessian; each row is rounded by itself."""
    if not is_finite(weight):
        raise CheckpointError(_NOT_FINITE)
    group_size, bits = packing["group_size"], packing["bits"]
    return _joined(
        _parts(_round(weight[rows].astype(mx.float32).T, factor, group_size, bits, dtype)) for rows in _slices(weight)
    )


def refit(
    weight: mx.array,
    hessian: mx.array,
    parts: Sequence[mx.array],
    packing: Mapping[str, Any],
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[mx.array]:
    """`parts`, which stand for `weight` (outputs, inputs), after some sweeps: no row loses more than it did."""
    if not sweeps:
        return list(parts)
    damped = _damped(hessian, damping)
    pieces = []
    for rows in _slices(weight):
        start = _as_rounded([part[rows] for part in parts], packing)
        pieces.append(_parts(refitted(weight[rows].astype(mx.float32).T, damped, start, sweeps)))
    return _joined(pieces)


def better_rows(
    weight: mx.array,
    hessian: mx.array,
    ours: Sequence[mx.array],
    theirs: Sequence[mx.array],
    packing: Mapping[str, Any],
    damping: float = DAMPING,
) -> list[mx.array]:
    """Of two that stand for `weight` (outputs, inputs), in each row the one that loses less for these inputs."""
    damped = _damped(hessian, damping)
    lost = []
    for parts in (ours, theirs):
        left = weight.astype(mx.float32) - dequantized_matrix(parts, packing)
        lost.append(((left @ damped) * left).sum(axis=1, keepdims=True))
    result = [mx.where(lost[0] <= lost[1], a, b) for a, b in zip(ours, theirs, strict=True)]
    mx.eval(result)
    return result


def _slices(weight: mx.array) -> list[slice]:
    """Rows of a weight, which do not depend on each other, a part at a time."""
    return [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(weight), ROWS_AT_ONCE)]


def _parts(made: Rounded) -> tuple[mx.array, ...]:
    """Weight, scales and biases as they are stored, evaluated."""
    codes = mx.array(pack_codes(np.array(made.codes.T), made.bits))
    parts = codes, made.scales.T.astype(made.dtype), made.biases.T.astype(made.dtype)
    mx.eval(parts)
    return parts


def _as_rounded(parts: Sequence[mx.array], packing: Mapping[str, Any]) -> Rounded:
    """What stored parts (outputs, inputs) say. A scale of 0 leaves its codes no meaning: it is 1 with codes of 0."""
    weight, scales, biases = parts
    codes = mx.dequantize(weight, mx.ones(scales.shape), mx.zeros(scales.shape), **packing)
    none = scales == 0
    codes = mx.where(mx.repeat(none, packing["group_size"], axis=1), 0, codes).astype(mx.uint8)
    steps = mx.where(none, 1, scales).astype(mx.float32)
    return Rounded(codes.T, steps.T, biases.astype(mx.float32).T, packing["bits"], scales.dtype)


def _joined(pieces: Iterable[Sequence[mx.array]]) -> list[mx.array]:
    return [mx.contiguous(mx.concatenate(list(kind))) for kind in zip(*pieces, strict=True)]


def _damped(hessian: mx.array, damping: float) -> mx.array:
    diagonal = mx.diag(hessian)
    return hessian + mx.diag(mx.full(diagonal.shape, damping * mx.maximum(diagonal.mean(), 1e-20)))


def inverse_factor(hessian: mx.array, damping: float = DAMPING) -> mx.array:
    """The upper triangular U with U^T U = (H + damping x the mean of H's diagonal)^-1.

    CheckpointError where H is not finite: no damping would help.
    """
    if not is_finite(hessian):
        raise CheckpointError(_NOT_FINITE)
    while True:
        # Read from its end, H = V V^T with an upper triangular V, whose inverse is U: no inverse of H is needed.
        backwards = _damped(hessian, damping)[::-1, ::-1]
        lower = mx.linalg.cholesky(mx.contiguous(backwards), stream=mx.cpu)
        if mx.all(mx.diag(lower) > 0).item() and mx.isfinite(lower).all().item():
            break
        damping *= 10  # float32 was too coarse for this one
    return mx.linalg.tri_inv(mx.contiguous(lower[::-1, ::-1]), upper=True, stream=mx.cpu)


def _round(rest: mx.array, factor: mx.array, group_size: int, bits: int, dtype: mx.Dtype) -> Rounded:
    """A transposed weight (inputs, outputs), rounded."""
    codes, scales, biases = [], [], []
    for first in range(0, len(factor), group_size):
        last = first + group_size
        group, rest = rest[:group_size], rest[group_size:]
        group_factor = factor[first:last, first:last]
        diagonal = mx.diag(group_factor)[:, None]
        # What an error of a column costs in the end is its square over this diagonal's.
        scale, bias = _grid(group, 1 / diagonal**2, bits, dtype)
        # A step away from what was wanted is the error with its sign turned, in units of the scale.
        chosen, steps = in_turn((group - bias) / scale, -group_factor / diagonal, bits)
        codes.append(chosen.astype(mx.uint8))
        rest = rest + (factor[first:last, last:] / diagonal).T @ (steps * scale)
        mx.eval(rest, codes[-1])
        scales.append(scale)
        biases.append(bias)
    return Rounded(mx.concatenate(codes), mx.stack(scales), mx.stack(biases), bits, dtype)


def _grid(group: mx.array, importance: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias (outputs), float32 values of `dtype`, that round (inputs, outputs) with little error.

    The ends of a group's range move together first, then the upper one alone, then the lower one.
    """
    low, high = group.min(axis=0), group.max(axis=0)
    top, together = mx.array(2.0**bits - 1), mx.array(_SHRINKS).reshape(-1, _TRIED_TOGETHER, 1)
    best, scale, bias = mx.full(low.shape, math.inf), mx.ones(low.shape), mx.zeros(low.shape)
    start, end = low, high  # of the best so far
    for moves in ("both", "upper", "lower"):
        lower, upper = start[None], end[None]
        for shrinks in together:
            first = lower if moves == "upper" else low * shrinks
            last = upper if moves == "lower" else high * shrinks
            steps = ((last - first) / top).astype(dtype).astype(mx.float32)
            steps = mx.where(steps > 0, steps, 1.0)  # a group of one value, which the bias holds
            offsets = first.astype(dtype).astype(mx.float32)
            errors = _costs(group, importance, steps[:, None], offsets[:, None], top).sum(axis=1)
            least, tried = mx.argmin(errors, axis=0, keepdims=True), (errors, steps, offsets, first, last)
            chosen = [mx.take_along_axis(mx.broadcast_to(each, errors.shape), least, axis=0)[0] for each in tried]
            better, before = chosen[0] < best, (best, scale, bias, start, end)
            best, scale, bias, start, end = (mx.where(better, a, b) for a, b in zip(chosen, before, strict=True))
            mx.eval(best, scale, bias, start, end)  # else the costs of all nine would be in memory together
    return scale, bias


@partial(mx.compile, shapeless=True)
def _costs(group: mx.array, importance: mx.array, scale: mx.array, bias: mx.array, top: mx.array) -> mx.array:
    """What rounding each weight of a group to the grid of `scale` and `bias` costs."""
    rounded = mx.clip(mx.round((group - bias) / scale), 0, top) * scale + bias
    return importance * (group - rounded) ** 2


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (rows, width) as MLX packs them: a stream of `bits` each, lowest bit first, in uint32 words."""
    rows = [
        np.packbits(((row[:, None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(-1), bitorder="little")
        for row in codes
    ]
    return np.stack(rows).view(np.uint32)


def dequantized_matrix(parts: Sequence[mx.array], packing: Mapping[str, Any] | None) -> mx.array:
    """The matrix that a packed weight stands for, in float32."""
    if packing is None:
        return parts[0].astype(mx.float32)
    weight, scales, biases = parts
    return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **packing)
