"""Fine-tuning: LoRA, QLoRA, DoRA and full, on any base; runs that survive crashes.

import phi3_mlx

result = phi3_mlx.tune("tiny", "my.jsonl", "adapter", epochs=3)
model, tokenizer = phi3_mlx.load("tiny", adapter="adapter")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..option import arguments
from ..values import check_functions, flag
from . import run
from .events import without_figures
from .settings import Settings
from .signals import pass_on

if TYPE_CHECKING:
    from .events import StepReport
    from .execution import Result

__all__ = ["Settings", "tune"]


def tune(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    valid: str | Path | None = None,
    holdout: float | None = None,
    objective: str = Settings.objective,
    beta: float | None = None,
    dpo_loss: str | None = None,
    label_smoothing: float | None = None,
    simpo_gamma: float | None = None,
    desirable_weight: float | None = None,
    undesirable_weight: float | None = None,
    best_by: str | None = None,
    method: str | None = None,
    from_adapter: str | Path | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool | None = None,
    dropout: float | None = None,
    targets: str | Iterable[str] | None = None,
    layers: int | str | None = None,
    train_on: str | None = None,
    max_length: int | None = None,
    overflow: str = Settings.overflow,
    batch_size: int = Settings.batch_size,
    accumulate: int = Settings.accumulate,
    order: str = Settings.order,
    epochs: float | None = None,
    steps: int | None = None,
    optimizer: str = Settings.optimizer,
    learning_rate: float | None = None,
    muon_rate: float | None = None,
    schedule: str = Settings.schedule,
    warmup: int | None = None,
    weight_decay: float | None = None,
    clip: float = Settings.clip,
    seed: int = Settings.seed,
    validate_every: int | None = None,
    save_every: int | None = None,
    patience: int | None = None,
    samples: str | Iterable[str] | None = None,
    sample_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    dtype: str | None = None,
    memory: int | str | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    force: bool = False,
    notify: Callable[[str], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_validation: Callable[[int, float, bool], None] | None = None,
    measure: Callable[[Result], None] | None = None,
) -> Result:
    """Fine-tune `model` on `data` (a .jsonl file, or a directory with train.jsonl and valid.jsonl) into `output`.

    The options are those of `phi3-mlx tune`, whose -h explains each; their home is `settings.Settings`. None is the
    usual value: method "lora" with rank 8, alpha 16 and no dropout on all layers, 3 epochs, weight decay 0.01, 5 % of
    the examples held out, answers to samples of 64 tokens. What is given and would do nothing is refused.

    `from_adapter` is an adapter's folder to train on from, with an optimizer of its own and perhaps other data: method,
    rank, alpha and layers are the adapter's, and others are refused.

    `resume` goes on with the interrupted run in `output`, which ends with the weights of one that was never
    interrupted. `force` tries a run that does not fit in memory. `notify` gets sentences about the data, which
    `Result.notes` keeps; without it those about examples that were left out or cut are Python warnings. `on_step` gets
    a report of every step, `on_validation` (step, loss, is it the best). `measure` gets the Result before it is
    returned, unless the run was interrupted: the best adapter is in `output` then, and its model out of memory.

    Everything is checked before the first step. Raises DataError (the file, line and key), OptionError,
    MemoryLimitError (numbers, and arguments that would fit), TrainingError (NaN; another run's checkpoint or
    folder), AdapterError (of `from_adapter`) and what `load` raises. Ctrl-C saves and returns a Result whose
    `interrupted` is True. So do SIGTERM and SIGHUP (a terminal that is closed), which then end the process, unless your
    program handles them.
    """
    settings = Settings.of(arguments(Settings, locals()))
    check_functions(notify=notify, on_step=on_step, on_validation=on_validation, measure=measure)
    result = run.start(
        settings,
        resume=flag(resume, "resume"),
        force=flag(force, "force"),
        notify=notify,
        on_step=on_step,
        measure=measure,
        on_validation=without_figures(on_validation),
    )
    pass_on(result.signal)
    return result
