"""What a run does in its steps, which the trainer is given: fine-tuning's course, or pretraining's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from . import optimizers
from .batches import Batches, Schedule
from .objective import Objective
from .preferences import make_objective

if TYPE_CHECKING:
    import mlx.optimizers as optim

    from .settings import Settings


@dataclass(frozen=True)
class Course:
    """What is made smaller, which examples each step reads, and how it moves the weights.

    `rate`: the learning rate of a step, counted from 0.
    """

    objective: Objective
    batches: Batches
    optimizer: optim.Optimizer
    rate: Callable[[int], float]

    @classmethod
    def of_tuning(cls, settings: Settings, lengths: Sequence[int] | np.ndarray) -> Course:
        """The course of a fine-tuning over examples of these lengths."""
        batches = Schedule.of(lengths, settings)
        return cls(
            make_objective(settings),
            batches,
            optimizers.make_optimizer(settings),
            partial(optimizers.learning_rate, settings, steps=batches.steps),
        )
