"""Optimizers by name, the learning rate's schedule, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from .settings import Settings


def make_optimizer(settings: Settings) -> optim.Optimizer:
    """The optimizer that `settings` names; its learning rate is set before every step."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        # Without the correction, MLX's default, the first steps are many times too long.
        return optim.AdamW(learning_rate=rate, weight_decay=decay, bias_correction=True)
    if settings.optimizer == "adam":
        return optim.Adam(learning_rate=rate, bias_correction=True)
    if settings.optimizer == "sgd":
        return optim.SGD(learning_rate=rate, momentum=0.9, weight_decay=decay)
    if settings.optimizer == "lion":
        return optim.Lion(learning_rate=rate, weight_decay=decay)
    if settings.optimizer == "adafactor":
        return optim.Adafactor(learning_rate=rate, relative_step=False, scale_parameter=False)
    return optim.Muon(learning_rate=rate, weight_decay=decay)


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of `steps`: up to the highest in the warm-up, then down to 0."""
    warmup = settings.warmup if settings.warmup is not None else round(0.03 * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.learning_rate * (1.0 if settings.schedule == "constant" else max(0.0, left))


def gradient_length(gradients: Any) -> mx.array:
    """The Euclidean length of all gradients together, float32."""
    squares = [mx.sum(mx.square(array.astype(mx.float32))) for _, array in tree_flatten(gradients)]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state, flat, for a checkpoint."""
    return dict(tree_flatten(optimizer.state))


def restore_optimizer(optimizer: optim.Optimizer, arrays: dict[str, mx.array]) -> None:
    """Put back what `optimizer_arrays` gave into an optimizer that was initialized for the same parameters.

    Raises ValueError for arrays of another optimizer or of other parameters.
    """
    present = optimizer_arrays(optimizer)
    odd = next(
        (
            n
            for n in {**present, **arrays}
            if n not in present or n not in arrays or present[n].shape != arrays[n].shape
        ),
        None,
    )
    if odd is not None:
        raise ValueError(f"{odd} is not of this optimizer and these parameters")
    optimizer.state = tree_map_with_path(lambda name, _: arrays[name], optimizer.state)
