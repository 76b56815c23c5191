"""A fine-tuning run from its settings to an adapter folder, whose files are in `folder.py`."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..adapters.folder import Base, base_of
from ..adapters.lora import Adapter, attach
from ..adapters.targets import find_targets
from ..engine.machine import bounded_run, room
from ..store import hub
from ..store.checkpoint import Checkpoint, model_size, open_checkpoint
from ..threads import refuse_fork
from .checkpoints import newest_checkpoint
from .checks import check_examples, check_is_model, check_method, check_samples, with_length, with_validation
from .data import Splits, read_data
from .examples import Encoded, encode_records
from .folder import CHECKPOINTS, RunFolder, check_folder, taken
from .log import check_tensorboard
from .onward import Start, attach_start, read_start
from .plan import TrainingPlan, allowed_bytes, does_not_fit, find_way_out, plan_memory, training_dtype
from .settings import Settings
from .signals import stop_on_signal
from .stored import absolute, at_its_commit, check_paths
from .trainer import Listener, StepReport, Trainer

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

Notify = Callable[[str], None]
_LOST_UPDATES = (
    "whole weights are trained in bfloat16, which loses updates below 1/256 of a weight; leave dtype out for float32",
)


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

    def _repr_markdown_(self) -> str:
        return result_markdown(self)


@dataclass(frozen=True)
class Prepared:
    """All that is known of a run before its model is loaded."""

    settings: Settings
    checkpoint: Checkpoint
    base: Base
    tokenizer: Tokenizer
    train: Encoded
    valid: Encoded
    plan: TrainingPlan
    available: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]  # those of the notes that say what is not trained on as it stands
    way_out: str  # what would make it fit, if it does not
    start: Start | None  # the adapter that it begins with

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation."""
        settings = {key: v for key, v in self.settings.as_dict().items() if key not in FREE}
        return {
            "base model": self.base.fingerprint,
            "training data": self.train.fingerprint(),
            "validation data": self.valid.fingerprint(),
            "adapter to begin with": None if self.start is None else self.start.fingerprint,
            "setting": settings,
        }


# What may differ where a run goes on: compared by content, or of no consequence.
FREE = ("output", "model", "data", "valid", "holdout", "from_adapter", "revision", "memory", "tensorboard")


def prepare(
    settings: Settings,
    notify: Notify | None = None,
    ranks: int = 1,
    *,
    fits: bool = True,
    resume: bool = False,
) -> Prepared:
    """Check settings and data, encode the examples, plan the memory. Loads no weights.

    With `fits` a run that does not fit is refused (MemoryLimitError). With `resume` settings that do nothing are let
    be: version 0.1.0 began such runs.
    """
    from ..text import tokenizer

    settings = absolute(settings.check())
    if settings.tensorboard:
        check_tensorboard()
    splits = read_data(settings.data, settings.valid)  # first: no download for a fault in the data
    directory = hub.resolve(settings.model, settings.revision)
    check_is_model(settings, directory)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    check_method(settings, config)
    settings = with_length(settings, config)
    find_targets(config, settings.targets, settings.layers)  # a wrong name fails here
    base = base_of(checkpoint, settings.model, settings.revision)
    start = None
    if settings.from_adapter is not None:
        begun = Path(settings.from_adapter)
        start = read_start(begun, config, base, targets=settings.targets, layers=settings.layers)
    splits = with_validation(splits, settings, resume=resume)
    vocabulary = tokenizer.read_tokenizer(directory)
    train, valid = _encode(splits, vocabulary, settings)
    check_examples(settings, train, valid, resume=resume)
    check_samples(settings, vocabulary, config)
    numbers = None if start is None else start.numbers
    size = model_size(checkpoint, training_dtype(settings))

    def replan(changed: Settings) -> TrainingPlan:
        return plan_memory(size, changed, *sizes(train, changed), ranks, numbers=numbers)

    gc.collect()  # an earlier run's model, in circles of references
    plan, available = replan(settings), room()
    warned = (
        *(_LOST_UPDATES if settings.method == "full" and settings.dtype == "bfloat16" else ()),
        *dict.fromkeys([*train.notes, *valid.notes]),
        *_losses(train, "training", settings),
        *_losses(valid, "validation", settings),
    )
    notes = (*splits.notes, *warned)
    limit = allowed_bytes(settings, available)
    way_out = "" if plan.total <= limit else find_way_out(settings, limit, replan)
    prepared = Prepared(
        settings, checkpoint, base, vocabulary, train, valid, plan, available, notes, warned, way_out, start
    )
    for note in notes:
        if notify:
            notify(note)
    if fits and way_out:
        raise does_not_fit(plan, limit, way_out)
    return prepared


def _encode(splits: Splits, tokenizer: Tokenizer, settings: Settings) -> tuple[Encoded, Encoded]:
    options: dict[str, Any] = {
        "max_length": settings.max_length,
        "overflow": settings.overflow,
        "train_on": settings.train_on,
    }
    return encode_records(splits.train, tokenizer, **options), encode_records(splits.valid, tokenizer, **options)


def sizes(encoded: Encoded, settings: Settings) -> tuple[list[int], list[int]]:
    """Of every example, cut as `settings` say: the tokens read, and those trained."""
    cut = settings.max_length
    lengths = [len(example.ids[:cut]) - 1 for example in encoded.examples]
    return lengths, [int(example.trained[:cut].sum()) for example in encoded.examples]


def _losses(encoded: Encoded, kind: str, settings: Settings) -> list[str]:
    """Sentences about examples that were too long."""
    said = []
    for sources, what in (
        (encoded.dropped, "left out"),
        (encoded.truncated, "cut at the end"),
        (encoded.split, "split into pieces"),
    ):
        if sources:
            named = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
            said.append(
                f"{len(sources):,} {kind} examples are longer than {settings.max_length:,} tokens and were {what}: "
                f"{named}"
            )
    return said


def load_for_training(prepared: Prepared) -> tuple[Model, dict[str, Adapter]]:
    """The model with new adapters on it (none for full fine-tuning), in training mode."""
    from ..store.checkpoint import read_model

    settings = prepared.settings
    model = read_model(prepared.checkpoint, dtype=training_dtype(settings))
    mx.random.seed(settings.seed)
    if settings.from_adapter is not None:
        return model, attach_start(model, Path(settings.from_adapter), settings.dropout)
    if settings.method == "full":
        model.unfreeze()
        return model, {}
    targets = find_targets(model.config, settings.targets, settings.layers)
    adapters = attach(
        model,
        targets,
        settings.rank,
        settings.alpha,
        rslora=settings.rslora,
        dora=settings.method == "dora",
        dropout=settings.dropout,
    )
    mx.eval(model.trainable_parameters())
    return model, adapters


def start(
    settings: Settings,
    *,
    resume: bool = False,
    force: bool = False,
    notify: Notify | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_validation: Callable[[int, float, bool], None] | None = None,
    on_sample: Callable[[str, str], None] | None = None,
) -> Result:
    """Run to the end, or to Ctrl-C, which saves and stops. See `tune`."""
    refuse_fork()
    group = mx.distributed.init()
    first = group.rank() == 0
    output = Path(os.path.abspath(os.path.expanduser(settings.output)))
    if settings.output and first:
        check_folder(output, resume)
    if resume:
        check_paths(settings)
        settings = at_its_commit(settings, output)
    prepared = prepare(settings, notify if first else None, group.size(), fits=not force, resume=resume)
    if notify is None and first:
        for note in prepared.warnings:
            warnings.warn(note, stacklevel=3)
    settings = prepared.settings
    with taken(output, resume) if first else nullcontext():
        checkpoint = newest_checkpoint(output / CHECKPOINTS) if resume else None
        model, adapters = load_for_training(prepared)
        listener = Listener()
        trainer = Trainer(
            model,
            prepared.train.examples,
            prepared.valid.examples,
            settings,
            output / CHECKPOINTS,
            prepared.identity,
            listener,
            group,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        folder = RunFolder(
            output,
            settings,
            prepared.base,
            prepared.tokenizer,
            model,
            adapters,
            trainer,
            on_step,
            on_validation,
            on_sample,
            notify,
        )
        started = time.perf_counter()
        with stop_on_signal() as stop, folder.writing() if first else nullcontext(), bounded_run():
            listener.stop = stop.is_set
            if first:
                listener.step, listener.validated, listener.noted = folder.step, folder.validated, folder.note
            finished = trainer.run()
    if notify is None:
        for note in folder.notes:
            warnings.warn(note, stacklevel=3)
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
        (*prepared.notes, *folder.notes),
        stop.signal,
    )


def result_markdown(result: Result) -> str:
    """How a fine-tuning run ended."""
    end = "stopped by Ctrl-C; `resume=True` goes on" if result.interrupted else "finished"
    best = ""
    if result.best_loss is not None:
        best = f", best validation loss {result.best_loss:.4f} nats a token at step {result.best_step:,}"
    head = f"**{result.step:,} steps**, {end}{best}; the adapter is in `{result.output.name}`"
    return "\n\n".join([head, *(f"*{note}*" for note in result.notes)])
