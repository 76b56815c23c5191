"""Fine-tuning: LoRA, QLoRA, DoRA and full, on any base; runs that survive what happens in a night.

import phi3_mlx

result = phi3_mlx.tune("tiny", "my.jsonl", "adapter", epochs=3)
model, tokenizer = phi3_mlx.load("tiny", adapter="adapter")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import run
from .settings import Settings

if TYPE_CHECKING:
    from .run import Result
    from .trainer import StepReport

__all__ = ["Settings", "tune"]


def tune(
    model: str,
    data: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    valid: str | Path | None = None,
    holdout: float = 0.05,
    method: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: tuple[str, ...] = (),
    layers: str | None = None,
    train_on: str = "answers",
    max_length: int | None = None,
    overflow: str = "drop",
    batch_size: int = 8,
    accumulate: int = 1,
    order: str = "shuffle",
    epochs: float = 3.0,
    steps: int | None = None,
    optimizer: str = "adamw",
    learning_rate: float = 2e-4,
    schedule: str = "cosine",
    warmup: int | None = None,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    validate_every: int | None = None,
    save_every: int | None = None,
    patience: int | None = None,
    samples: tuple[str, ...] = (),
    sample_tokens: int = 64,
    gradient_checkpointing: bool = False,
    dtype: str | None = None,
    memory: int | str | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    notify: Callable[[str], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_validation: Callable[[int, float, bool], None] | None = None,
) -> Result:
    """Fine-tune `model` on `data` (a .jsonl file, or a directory with train.jsonl and valid.jsonl) into `output`.

    The options are those of `phi3-mlx tune`, whose -h explains each; their home is `settings.Settings`. `resume` goes
    on with the interrupted run in `output`, which ends with the weights of one that was never interrupted. `notify`
    gets sentences about the data, `on_step` a report of every step, `on_validation` (step, loss, is it the best).

    Everything is checked before the first step. Raises DataError (the file, line and key), OptionError,
    MemoryLimitError (numbers, and flags that would fit), TrainingError (no number; another run's checkpoint or folder),
    and what `load` raises. Ctrl-C saves and returns a Result whose `interrupted` is True.
    """
    settings = Settings(
        model=model,
        data=str(data),
        output=str(output),
        revision=revision,
        valid=None if valid is None else str(valid),
        holdout=holdout,
        method=method,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        targets=tuple(targets),
        layers=layers,
        train_on=train_on,
        max_length=max_length,
        overflow=overflow,
        batch_size=batch_size,
        accumulate=accumulate,
        order=order,
        epochs=epochs,
        steps=steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        validate_every=validate_every,
        save_every=save_every,
        patience=patience,
        samples=tuple(samples),
        sample_tokens=sample_tokens,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        memory=None if memory is None else str(memory),
        tensorboard=tensorboard,
    )
    return run.start(settings, resume=resume, notify=notify, on_step=on_step, on_validation=on_validation)
