"""A run in its folder, from the trainer's first step to its last: fine-tuning and pretraining go this way."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..engine.machine import bounded_run
from .checkpoints import newest_checkpoint
from .events import Listener, StepReport, Validated
from .folder import CHECKPOINTS, RunFolder, Write, taken
from .run_settings import RunSettings
from .signals import stop_on_signal
from .trainer import Trainer

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer
    from .course import Course

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainingJob:
    """What a run needs beside its folder.

    `identity`: what must not change between a checkpoint and its continuation; `facts`: what run.json says beside the
    settings. `load` gives the model, and what writes the run's product into a directory. `course`: of the trainer, that
    of fine-tuning by default. `valid_figures` makes figures for people of a validation loss.
    """

    settings: RunSettings
    output: Path
    tokenizer: Tokenizer
    train: Sequence[Any]
    valid: Sequence[Any]
    identity: Mapping[str, Any]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    load: Callable[[], tuple[Model, Write]]
    objective: str
    product: str
    course: Course | None = None
    valid_figures: Callable[[float], dict[str, float]] | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended: `finished` is False if it was stopped before its last step; losses are validation's.

    `notes` are sentences about the data (what was held out, left out or cut) and of what went wrong on the way.
    """

    output: Path
    finished: bool
    interrupted: bool
    step: int
    best_step: int | None
    best_loss: float | None
    tokens: int
    seconds: float
    first_rank: bool = True  # False in the other processes of a distributed run, which write and print nothing
    notes: tuple[str, ...] = ()
    signal: int | None = field(default=None, repr=False)  # that it was told to stop by: Ctrl-C's or another
    objective: str = "sft"
    best_accuracy: float | None = None  # of the pairs of validation, where the best is that with the highest
    product: str = "adapter"  # what is in `output`

    def _repr_markdown_(self) -> str:
        return result_markdown(self)


def execute(
    job: TrainingJob,
    *,
    resume: bool,
    notify: Notify | None,
    on_step: Callable[[StepReport], None] | None,
    on_validation: Validated | None,
    on_sample: Callable[[str, str], None] | None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Result:
    """Run to the end, or to a signal, which saves and stops. Raises TrainingError.

    Without `notify` what went wrong on the way is a Python warning.
    """
    group = mx.distributed.init()
    first, output = group.rank() == 0, job.output
    with taken(output, resume) if first else nullcontext():
        checkpoint = newest_checkpoint(output / CHECKPOINTS) if resume else None
        model, write = job.load()
        listener = Listener()
        trainer = Trainer(
            model,
            job.train,
            job.valid,
            job.settings,
            output / CHECKPOINTS,
            job.identity,
            listener,
            group,
            job.course,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        folder = RunFolder(
            output,
            job.settings,
            job.facts,
            job.tokenizer,
            model,
            write,
            trainer,
            on_step,
            on_validation,
            on_sample,
            notify,
            job.valid_figures,
        )
        started = time.perf_counter()
        with stop_on_signal() as stop, folder.writing() if first else nullcontext(), bounded_run():
            listener.stop = stop.is_set
            if first:
                listener.step, listener.validated, listener.noted = folder.step, folder.validated, folder.note
                listener.scored = on_reference or listener.scored
            finished = trainer.run()
    for note in folder.notes if notify is None else ():
        warnings.warn(note, stacklevel=4)  # at the call of `tune` or `pretrain`
    progress = trainer.progress
    return Result(
        output,
        finished,
        stop.is_set() and not finished,
        progress.step,
        progress.best_step,
        progress.best_loss,
        progress.tokens,
        time.perf_counter() - started,
        first,
        (*job.notes, *folder.notes),
        stop.signal,
        job.objective,
        progress.best_accuracy,
        job.product,
    )


def best_text(result: Result) -> str:
    """What the best checkpoint was like in validation."""
    if result.best_accuracy is None:
        return f"best validation loss {result.best_loss:.4f}"
    return f"best validation {result.best_accuracy:.0%} of the pairs right with loss {result.best_loss:.4f}"


def result_markdown(result: Result) -> str:
    """How a run ended."""
    end = "stopped by Ctrl-C; `resume=True` goes on" if result.interrupted else "finished"
    best = ""
    if result.best_loss is not None:
        unit = " nats a token" if result.objective in ("sft", "pretrain") else ""
        best = f", {best_text(result)}{unit} at step {result.best_step:,}"
    head = f"**{result.step:,} steps**, {end}{best}; the {result.product} is in `{result.output.name}`"
    return "\n\n".join([head, *(f"*{note}*" for note in result.notes)])
