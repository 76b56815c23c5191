"""How pretraining moves the weights: which optimizer has which, their rates, and the schedules."""

from __future__ import annotations

import math

import mlx.optimizers as optim

from ..tuning.optimizers import Grouped, is_vector, muon_and_adamw
from .settings import PretrainSettings


def make_pretraining_optimizer(settings: PretrainSettings) -> Grouped:
    """AdamW for all, or Muon for the layers' matrices and AdamW for the others. Norms and biases do not decay."""
    rate, decay, betas = settings.learning_rate, settings.weight_decay, [0.9, settings.beta2]
    if settings.optimizer == "muon":
        return muon_and_adamw(rate, settings.muon_rate, decay, betas)
    plain = optim.AdamW(rate, betas, weight_decay=0.0, bias_correction=True)
    decaying = optim.AdamW(rate, betas, weight_decay=decay, bias_correction=True)
    return Grouped([plain, decaying], [is_vector], [1.0, 1.0])


def rate_of(settings: PretrainSettings, step: int, steps: int) -> float:
    """AdamW's learning rate in a step, counted from 0: the peak of its phase, times the schedule's share of it."""
    peak = settings.learning_rate
    if settings.phase2_rate is not None and step >= settings.phase2_step(steps):
        peak = settings.phase2_rate
    return peak * share_of_peak(settings, step, steps)


def share_of_peak(settings: PretrainSettings, step: int, steps: int) -> float:
    """Up to 1 in the warm-up; then as the schedule says down to `final_rate`.

    wsd (warm-up, stable, decay): 1 until the last `decay` of the steps, then linearly down.
    """
    warmup = settings.warmup_steps(steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    elif settings.schedule == "wsd":
        left = min(1.0, (steps - step) / max(1, round(settings.decay * steps)))
    return settings.final_rate + (1 - settings.final_rate) * max(0.0, left)
