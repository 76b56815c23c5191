"""Optimizers by name, the learning rate's schedule, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from .settings import Settings


class Muon(optim.Muon):
    """MLX's Muon with decoupled weight decay, as AdamW has it and Liu et al. (2025, arXiv 2502.16982) use it."""

    def __init__(self, learning_rate: float, decay: float):
        super().__init__(learning_rate, momentum=0.95, weight_decay=0.0)
        self._decay = decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        result: mx.array = super().apply_single(
            gradient, parameter * (1 - self.learning_rate.astype(gradient.dtype) * self._decay), state
        )
        return result


class Grouped(optim.MultiOptimizer):
    """Optimizers of which each has some weights; their rates keep their ratio when `learning_rate` is set."""

    def __init__(self, optimizers: list[optim.Optimizer], filters: list[Any], ratios: list[float]):
        super().__init__(optimizers, filters)
        self._ratios = ratios

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for optimizer, ratio in zip(self.optimizers, self._ratios, strict=True):
            optimizer.learning_rate = rate * ratio


def muon_and_adamw(rate: float, muon_rate: float, decay: float, betas: list[float]) -> Grouped:
    """Muon for the decoder layers' matrices, and AdamW with `rate` for embeddings, output layer, norms and biases.

    Norms and biases do not decay. A mixture's stacks of experts are AdamW's.
    """
    plain = optim.AdamW(rate, betas, weight_decay=0.0, bias_correction=True)
    decaying = optim.AdamW(rate, betas, weight_decay=decay, bias_correction=True)
    return Grouped([plain, Muon(muon_rate, decay), decaying], [is_vector, is_muons], [1.0, muon_rate / rate, 1.0])


def is_vector(name: str, array: mx.array) -> bool:
    """Whether a weight is a norm's or a bias."""
    return array.ndim < 2


def is_muons(name: str, array: mx.array) -> bool:
    """Whether a weight is a matrix of a decoder layer: Muon is for these (Jordan et al. 2024)."""
    return array.ndim == 2 and ".layers." in f".{name}"


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
    if settings.method == "lora":  # all that is trained are matrices of the layers
        return Muon(rate, decay)
    return muon_and_adamw(rate, settings.muon_rate or rate, decay, [0.9, 0.999])


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
