"""What a run tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Validated = Callable[[int, float, bool, Mapping[str, float]], None]  # step, loss, is it the best, the figures


def without_figures(told: Callable[[int, float, bool], None] | None) -> Validated | None:
    """A function of Python's callers, who get no figures, as a run calls it."""
    return None if told is None else lambda step, loss, best, _: told(step, loss, best)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the objective's mean before the update, SFT's over trained tokens; memory in bytes.

    `figures` are the means of what the objective measures beside it.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    peak_memory: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Listener:
    """What a run tells while it goes on; every function may be replaced."""

    step: Callable[[StepReport], None] = field(default=lambda report: None)
    noted: Callable[[str], None] = field(default=lambda sentence: None)  # what went wrong, and the run goes on
    validated: Validated = field(default=lambda step, loss, best, figures: None)
    scored: Callable[[int, int], None] = field(default=lambda done, total: None)  # sequences, by the reference
    saved: Callable[[Path], None] = field(default=lambda path: None)
    stop: Callable[[], bool] = field(default=lambda: False)  # asked after every step
