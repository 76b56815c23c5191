"""Packed layers whose scales and biases are trained while their integers stay.

A packed weight is `scale * code + bias`. What is trained is relative: a *gain*, by which the spread of a group about
the middle code grows, and a *shift* of the group, in steps of its scale. Both begin at 0, where the layer is exactly
what was packed. Forward passes round scales and biases to the dtype in which they are stored; gradients pass straight
through that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.experts import Groups


class Trained(nn.Module):
    """A matrix, or one for each expert, packed as `parts` (weight, scales, biases) in an affine `packing`.

    `gain` and `shift` are its parameters, both of the scales' shape and in float32.
    """

    def __init__(self, parts: Sequence[mx.array], packing: Mapping[str, Any]):
        super().__init__()
        self._codes, self._scales, self._biases = parts
        self._packing = dict(packing)
        self.gain, self.shift = mx.zeros(self._scales.shape), mx.zeros(self._scales.shape)

    def matrix(self) -> mx.array:
        """The weight in float32, differentiable."""
        return dequantized(self._codes, *self._grid(), self._packing)

    def parts(self) -> list[mx.array]:
        """Weight, scales and biases as they are stored, evaluated."""
        scales, biases = (part.astype(self._scales.dtype) for part in self._grid())
        mx.eval(scales, biases)
        return [self._codes, scales, biases]

    def _grid(self, rows: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Scales and biases (of some rows), float32 values of their dtype. A bias makes up for its scale's rounding."""
        arrays = (self._scales, self._biases, self.gain, self.shift)
        stored, biases, gain, shift = arrays if rows is None else tuple(array[rows] for array in arrays)
        before = stored.astype(mx.float32)
        scales = _through(before * (1 + gain), stored.dtype)
        middle = (2 ** self._packing["bits"] - 1) / 2
        return scales, _through(biases.astype(mx.float32) + before * shift - middle * (scales - before), stored.dtype)


class TrainedLinear(Trained):
    """Stands for a linear layer. `plain` is the layer that multiplies, whose own weight is not read."""

    def __init__(self, plain: nn.Module, parts: Sequence[mx.array], packing: Mapping[str, Any]):
        super().__init__(parts, packing)
        self._plain = plain
        plain.weight = _NO_WEIGHT
        plain.freeze()
        plain.train()  # in training experts multiply without waiting for the router

    def __call__(self, x: mx.array, *groups: Groups) -> mx.array:
        self._plain.weight = self.matrix()
        try:
            return self._plain(x, *groups)
        finally:
            self._plain.weight = _NO_WEIGHT  # one that was kept would keep the graph behind it


class TrainedEmbedding(Trained):
    """Stands for an embedding, which may be the layer of logits, too."""

    def __call__(self, ids: mx.array) -> mx.array:
        return dequantized(self._codes[ids], *self._grid(ids), self._packing)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.matrix().T


_NO_WEIGHT = mx.array(0.0)


def dequantized(codes: mx.array, scales: mx.array, biases: mx.array, packing: Mapping[str, Any]) -> mx.array:
    """`mx.dequantize` with gradients for scales and biases, for which it keeps nothing but its arguments."""

    @mx.custom_function
    def matrix(scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(codes, scales, biases, **packing)

    @matrix.vjp
    def matrix_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        scales, biases = primals
        by_group = cotangent.reshape(*scales.shape, -1)
        integers = mx.dequantize(codes, mx.ones_like(scales), mx.zeros_like(biases), **packing)
        return (by_group * integers.reshape(by_group.shape)).sum(axis=-1), by_group.sum(axis=-1)

    return matrix(scales, biases)  # type: ignore[return-value]


def _through(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Rounded to `dtype`; the gradient is that of `array`."""
    return array + mx.stop_gradient(array.astype(dtype).astype(array.dtype) - array)
