"""Linear layers with adapters: LoRA (arXiv 2106.09685), rsLoRA's scale (2312.03732), DoRA (2402.09353), on any base.

Shapes are mlx-lm's: `lora_a` (inputs, rank), `lora_b` (rank, outputs), `m` (outputs,). With r components and scale s
LoRA adds s * (x @ lora_a) @ lora_b to the layer's output. DoRA scales every output row of the changed weight to the
length `m`; the length that it divides by is a constant in the gradient, as in the paper's section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from ..models.dropout import dropped
from ..models.hooks import get_layer, set_layer
from ..models.linear import plain_weight
from .targets import Target


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What the low-rank product is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class Adapter(nn.Module):
    """The low-rank change of one linear layer. Its arrays are float32 in every dtype of the layer.

    `mask` (rank, outputs) of 0 and 1 keeps the parts of a fused layer apart: each component of `lora_b` then changes
    the rows of its own part alone, and mlx-lm can still read the file.
    """

    def __init__(
        self,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        *,
        m: mx.array | None = None,
        dropout: float = 0.0,
        mask: mx.array | None = None,
    ):
        super().__init__()
        self.lora_a, self.lora_b = lora_a, lora_b
        if m is not None:
            self.m = m
        self._scale, self._dropout, self._mask = scale, dropout, mask
        self._gain: mx.array | None = None  # DoRA's m / length; computed once outside training

    @property
    def scale(self) -> float:
        return self._scale

    @property
    def is_dora(self) -> bool:
        return "m" in self

    @property
    def dropout(self) -> float:
        return self._dropout

    @property
    def largest(self) -> float:
        """The largest absolute value that the layer's dtype must hold to compute with the adapter."""
        a, b = self.product()
        return float(mx.maximum(mx.abs(a).max(), mx.abs(b).max()).item())  # type: ignore[arg-type]

    def separated(self) -> mx.array:
        """`lora_b` (rank, outputs) with the parts kept apart."""
        return self.lora_b if self._mask is None else self.lora_b * self._mask

    def product(self) -> tuple[mx.array, mx.array]:
        """`lora_a` (inputs, rank) and scaled `lora_b` (rank, outputs)."""
        return self.lora_a, self.separated() * self._scale

    def delta(self, x: mx.array, y: mx.array, linear: nn.Module) -> mx.array:
        """What the adapter adds to the layer's output `y` (..., outputs) for its input `x` (..., inputs)."""
        a, b = self.product()
        seen = dropped(x, self._dropout) if self._dropout and self.training else x
        z = (seen @ a.astype(x.dtype)) @ b.astype(x.dtype)
        if not self.is_dora:
            return z
        gain = self.gain(linear).astype(x.dtype)
        if "bias" in linear:
            y = y - linear.bias  # DoRA scales the matrix, not the bias
        return gain * (y + z) - y

    def gain(self, linear: nn.Module) -> mx.array:
        """DoRA's factor for every output row: m / the length of the changed row, (outputs,)."""
        if self._gain is not None and not self.training:
            return self._gain
        gain = self.m / mx.stop_gradient(changed_lengths(linear, *self.product()))
        self._gain = None if self.training else gain
        return gain

    def changed_weight(self, linear: nn.Module) -> mx.array:
        """The layer's weight with this adapter merged into it, float32 (outputs, inputs)."""
        a, b = self.product()
        weight = float_weight(linear) + (a @ b).T
        if self.is_dora:
            weight = weight * (self.m / mx.linalg.norm(weight, axis=1))[:, None]
        return weight


class AdaptedLinear(nn.Module):
    """A linear layer and the adapters on it, each with the weight that `use` gives it.

    The output is y + sum of weight * (what the adapter alone would add).
    """

    def __init__(self, linear: nn.Module, adapters: Mapping[str, Adapter] | None = None):
        super().__init__()
        self.linear = linear
        self.adapters = dict(adapters or {})
        self._weights: dict[str, float] = dict.fromkeys(self.adapters, 1.0)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        deltas = [(w, self.adapters[name].delta(x, y, self.linear)) for name, w in self._weights.items() if w]
        for weight, delta in deltas:
            y = y + (delta if weight == 1.0 else weight * delta)
        return y

    @property
    def in_use(self) -> tuple[tuple[str, float, float], ...]:
        """What the arrays do not say of the output: the adapters that count, each with its weight and its scale."""
        return tuple((name, weight, self.adapters[name].scale) for name, weight in self._weights.items() if weight)

    def use(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: weight for name, weight in weights.items() if name in self.adapters}

    def remove(self, name: str) -> None:
        """Forget one of the adapters."""
        del self.adapters[name]
        self._weights.pop(name, None)


def new_adapter(
    linear: nn.Module, target: Target, rank: int, alpha: float, *, rslora: bool, dora: bool, dropout: float
) -> Adapter:
    """An adapter that changes nothing yet: `lora_a` uniform within 1 / sqrt(inputs), `lora_b` zero.

    Each part of a fused layer gets `rank` components of its own.
    """
    bound = 1 / math.sqrt(target.columns)
    components = rank * len(target.parts)
    mask = None
    if target.parts[0][1:] != (0, target.rows):
        rows = mx.arange(target.rows)
        mask = mx.concatenate(
            [mx.broadcast_to((rows >= first) & (rows < last), (rank, target.rows)) for _, first, last in target.parts]
        ).astype(mx.float32)
    return Adapter(
        mx.random.uniform(-bound, bound, (target.columns, components)),
        mx.zeros((components, target.rows)),
        scale_of(alpha, rank, rslora),
        m=row_lengths(linear) if dora else None,
        dropout=dropout,
        mask=mask,
    )


def attach(
    model: nn.Module,
    targets: Iterable[Target],
    rank: int,
    alpha: float,
    *,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
) -> dict[str, Adapter]:
    """Put a new adapter on every target and freeze everything else; returns the adapters by layer path."""
    model.freeze()
    adapters = {}
    for target in targets:
        linear = get_layer(model, target.path)
        adapter = new_adapter(linear, target, rank, alpha, rslora=rslora, dora=dora, dropout=dropout)
        set_layer(model, target.path, AdaptedLinear(linear, {"default": adapter}))
        adapters[target.path] = adapter
    return adapters


# What adapters need from their base layer, packed or not


def float_weight(linear: nn.Module) -> mx.array:
    """The layer's weight as float32 (outputs, inputs), dequantized if it is packed."""
    return plain_weight(linear).astype(mx.float32)


def row_lengths(linear: nn.Module) -> mx.array:
    """The length (L2 norm) of every output row of the weight, float32 (outputs,)."""
    return mx.linalg.norm(float_weight(linear), axis=1)


def changed_lengths(linear: nn.Module, a: mx.array, b: mx.array) -> mx.array:
    """Row lengths of W + (a @ b).T without making that matrix: |w|^2 + 2 w.d + |d|^2 a row, float32 (outputs,)."""
    weight = float_weight(linear)
    squares = mx.sum(weight * weight, axis=1)
    crossed = mx.sum((weight @ a) * b.T, axis=1)
    changes = mx.sum(b * ((a.T @ a) @ b), axis=0)
    return mx.sqrt(mx.maximum(squares + 2 * crossed + changes, 1e-30))
