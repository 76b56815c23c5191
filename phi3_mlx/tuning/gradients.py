"""Loss and gradients of parts of a batch, added up in float32 whatever the model computes in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..models.decoder import Model
from .batches import Part
from .objective import SFT, Objective
from .optimizers import gradient_length

# What the loss is multiplied by in the backward pass. A sum over thousands of tokens may be more than float16 holds,
# 65,504, so that the part is computed again with the next; the mean's 1 / tokens would lose small gradients instead.
_SCALES = (1.0, 2.0**-6, 2.0**-12)


class Gradients:
    """Of an objective's loss, summed over examples, by the model's trained arrays."""

    def __init__(self, model: Model, objective: Objective | None = None, *, checkpoint: bool = False):
        self._model, self._objective = model, objective or SFT()
        self._scales = _SCALES if model.dtype == mx.float16 else (1.0,)

        def scaled(part: Part, keys: mx.array | None, scale: float) -> tuple[mx.array, mx.array]:
            loss, figures = self._objective.loss(model, part, checkpoint=checkpoint, keys=keys)
            return loss * scale, figures

        self._function = nn.value_and_grad(model, scaled)

    def of(self, part: Part, keys: mx.array | None = None) -> tuple[float, Any, mx.array]:
        """(loss, gradients in float32, figures (2, n)), computed; see `Objective.loss`."""
        for scale in self._scales:
            (value, figures), gradients = self._function(part, keys, scale)
            gradients = _divided(gradients, scale)
            mx.eval(value, figures, gradients)
            loss = float(value) / scale
            if not math.isfinite(loss) or math.isfinite(float(gradient_length(gradients))):
                break  # NaN stays NaN
        return loss, gradients, figures

    def of_parts(self, parts: Iterable[tuple[Part, mx.array | None]]) -> tuple[float, Any, mx.array]:
        """The sums over parts, each with its keys; zeros without any."""
        loss, told, total = 0.0, mx.zeros((2, len(self._objective.figures))), None
        for part, keys in parts:
            value, gradients, figures = self.of(part, keys)
            loss, told = loss + value, told + figures
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            del gradients  # else it would be kept beside the next one
            mx.eval(told, total)
        return loss, total or tree_map(lambda a: mx.zeros(a.shape), self._model.trainable_parameters()), told


def _divided(gradients: Any, by: float) -> Any:
    return tree_map(lambda gradient: gradient.astype(mx.float32) / by, gradients)
