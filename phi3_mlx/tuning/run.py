"""A fine-tuning run from its settings to an adapter folder, whose files are in `folder.py`."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..adapters.folder import Base, adapter_files, base_of, write_adapter
from ..adapters.lora import Adapter, attach
from ..adapters.targets import find_targets
from ..engine.machine import room
from ..paths import absolute_path
from ..store import hub
from ..store.checkpoint import Checkpoint, model_size, open_checkpoint
from ..threads import refuse_fork
from .checks import (
    check_examples,
    check_is_model,
    check_method,
    check_samples,
    lost_updates,
    with_length,
    with_validation,
)
from .data import read_data
from .events import StepReport, Validated
from .examples import Encoded
from .execution import Notify, Result, TrainingJob, execute
from .folder import Write, check_folder
from .log import check_tensorboard
from .onward import Start, attach_start, read_start
from .plan import TrainingPlan, allowed_bytes, does_not_fit, find_way_out, plan_memory, training_dtype
from .preferences import make_objective
from .settings import Settings
from .stored import absolute, at_its_commit, check_paths

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer


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
    objective = make_objective(settings)
    splits = read_data(settings.data, settings.valid, objective.read)  # first: no download for a fault in the data
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
    train, valid = (objective.encode(records, vocabulary, settings) for records in (splits.train, splits.valid))
    check_examples(settings, train, valid, resume=resume)
    check_samples(settings, vocabulary, config)
    numbers = None if start is None else start.numbers
    size = model_size(checkpoint, training_dtype(settings))

    def replan(changed: Settings) -> TrainingPlan:
        return plan_memory(size, changed, *sizes(train, changed), ranks=ranks, numbers=numbers)

    gc.collect()  # an earlier run's model, in circles of references
    plan, available = replan(settings), room()
    warned = (
        *lost_updates(settings),
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


def sizes(encoded: Encoded, settings: Settings) -> tuple[list[int], list[int], list[int]]:
    """Of every example, cut as `settings` say: the tokens read, those trained, and a head's attention scores."""
    cut = settings.max_length
    lengths, trained, scores = [], [], []
    for example in encoded.examples:
        each = [len(sequence.ids[:cut]) - 1 for sequence in example.sequences]
        lengths.append(sum(each))
        trained.append(sum(int(sequence.trained[:cut].sum()) for sequence in example.sequences))
        scores.append(sum(n * n for n in each))
    return lengths, trained, scores


def _losses(encoded: Encoded, kind: str, settings: Settings) -> list[str]:
    """Sentences about examples that are not trained on as they stand."""
    said, longer = [], f"are longer than {settings.max_length:,} tokens and were"
    for sources, what in (
        (encoded.empty, "have nothing to learn and were left out"),
        (encoded.dropped, f"{longer} left out"),
        (encoded.truncated, f"{longer} cut at the end"),
        (encoded.split, f"{longer} split into pieces"),
    ):
        if sources:
            named = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
            said.append(f"{len(sources):,} {kind} examples {what}: {named}")
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
    on_validation: Validated | None = None,
    on_sample: Callable[[str, str], None] | None = None,
    measure: Callable[[Result], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Result:
    """Run to the end, or to Ctrl-C, which saves and stops. See `tune`."""
    refuse_fork()
    group = mx.distributed.init()
    first = group.rank() == 0
    output = Path(absolute_path(settings.output))
    if settings.output and first:
        check_folder(output, resume)
    if resume:
        check_paths(settings)
        settings = at_its_commit(settings, output)
    prepared = prepare(settings, notify if first else None, group.size(), fits=not force, resume=resume)
    if notify is None and first:
        for note in prepared.warnings:
            warnings.warn(note, stacklevel=3)
    result = execute(
        _job(prepared, output),
        resume=resume,
        notify=notify,
        on_step=on_step,
        on_validation=on_validation,
        on_sample=on_sample,
        on_reference=on_reference,
    )
    if measure is not None and first and not result.interrupted:
        gc.collect()  # the run's memory is the measurement's
        mx.clear_cache()
        measure(result)
    return result


def _job(prepared: Prepared, output: Path) -> TrainingJob:
    settings = prepared.settings

    def load() -> tuple[Model, Write]:
        model, adapters = load_for_training(prepared)

        def write(directory: Path, step: int) -> None:
            """Write the adapter of a step into a folder."""
            facts = {"alpha": settings.alpha, "rank": settings.rank, "rslora": settings.rslora, "step": step}
            write_trained(directory, model, adapters, prepared.base, phi3_mlx=facts)

        return model, write

    return TrainingJob(
        settings,
        output,
        prepared.tokenizer,
        prepared.train.examples,
        prepared.valid.examples,
        prepared.identity,
        {"base_model": dataclasses.asdict(prepared.base)},
        prepared.notes,
        load,
        settings.objective,
        "adapter",
    )


def write_trained(
    directory: Path, model: Model, adapters: Mapping[str, Adapter], base: Base, *, phi3_mlx: Mapping[str, Any]
) -> None:
    """Write adapters, or without any the model's trained weights, as an adapter's folder; `phi3_mlx` is our own key."""
    layers = model.config.num_hidden_layers
    if adapters:
        tensors, config = adapter_files(adapters, layers, base, phi3_mlx=phi3_mlx)
    else:
        tensors = dict(tree_flatten(model.trainable_parameters()))
        config = {
            "fine_tune_type": "full",
            "num_layers": layers,
            "lora_parameters": {},
            "phi3_mlx": phi3_mlx,
            "base_model": dataclasses.asdict(base),
        }
    config["model"] = base.name
    write_adapter(directory, tensors, config)
