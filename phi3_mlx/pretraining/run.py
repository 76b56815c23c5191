"""A pretraining run from its settings to a model directory. The trainer and the folder are fine-tuning's."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..config import read_json
from ..engine.machine import room
from ..errors import ConfigError, OptionError
from ..models import parse_config
from ..paths import absolute_path, has_tokenizer
from ..store import hub
from ..store.checkpoint import DTYPES, ModelSize
from ..store.companions import find_companions
from ..store.family import parameter_count
from ..threads import refuse_fork
from ..tuning.batches import PartSize
from ..tuning.checks import check_dtype_of_all, lost_updates, with_length
from ..tuning.course import Course
from ..tuning.events import StepReport, Validated
from ..tuning.execution import Notify, Result, TrainingJob, execute
from ..tuning.folder import Write, check_folder
from ..tuning.log import check_tensorboard
from ..tuning.plan import TrainingPlan, allowed_bytes, does_not_fit, find_way_out, plan_part
from ..values import shown
from .corpus import MAX_LENGTH, Corpus, read_corpus
from .next_token import NextToken
from .optimizer import make_pretraining_optimizer, rate_of
from .settings import PretrainSettings, shares
from .weights import STD, fresh_model, write_pretrained

if TYPE_CHECKING:
    from ..config import Config
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

# What may differ where a run goes on: compared by content, or of no consequence.
MAY_DIFFER = ("config", "data", "phase2_data", "output", "tokenizer", "valid", "memory", "tensorboard")


@dataclass(frozen=True)
class PreparedPretraining:
    """All that is known of a run before its weights are made."""

    settings: PretrainSettings
    raw_config: dict[str, Any]
    config: Config
    tokenizer: Tokenizer
    tokenizer_directory: Path
    corpus: Corpus
    plan: TrainingPlan
    available: int
    way_out: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data, and those that are warnings."""
        return (*self.corpus.notes, *self.warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the notes those that Python warns of where nobody takes notes."""
        return lost_updates(self.settings)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation."""
        return {
            "config": self.raw_config,
            "training data": self.corpus.fingerprint,
            "setting": {key: v for key, v in self.settings.as_dict().items() if key not in MAY_DIFFER},
        }


def prepare_pretraining(settings: PretrainSettings, ranks: int = 1, *, fits: bool = True) -> PreparedPretraining:
    """Check settings, config and shards, and plan the memory. Makes no weights.

    With `fits` a run that does not fit is refused (MemoryLimitError).
    """
    from ..text.tokenizer import read_tokenizer

    settings = with_full_paths(settings.check())
    check_dtype_of_all(settings)
    if settings.tensorboard:
        check_tensorboard()
    raw, config, place = _read_config(settings)
    settings = with_length(settings, config, MAX_LENGTH)
    if settings.init_std is None:
        std = raw.get("initializer_range", STD)
        if not isinstance(std, (int, float)) or isinstance(std, bool) or not 0 < std < 1:
            raise ConfigError(f"{settings.config}: initializer_range {shown(std)} is no deviation; give init_std")
        settings = dataclasses.replace(settings, init_std=float(std))
    if settings.tokenizer is None and not has_tokenizer(place):
        raise OptionError(f"{place} has no tokenizer; name a model that has the shards' with tokenizer=NAME")
    tokenizer = read_tokenizer(place)
    find_companions(place)  # a file that cannot be copied fails here
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{settings.config}: vocab_size {config.vocab_size:,} is less than the {tokenizer.vocab_size:,} tokens of "
            f"the tokenizer in {place}"
        )
    corpus = read_corpus(settings, config, tokenizer)
    numbers, itemsize = parameter_count(config), DTYPES[settings.dtype or "float32"].size
    size = ModelSize(config, numbers * itemsize, 0, itemsize, numbers)

    def replan(changed: PretrainSettings) -> TrainingPlan:
        train = corpus.train
        rows = -(-changed.batch_size // min(changed.batch_size, changed.accumulate * ranks))
        shorter = (changed.max_length or 0) / (settings.max_length or 1)
        tokens = int(rows * int(train.lengths.max()) * shorter)
        scores = int(rows * int(train.scores.max()) * shorter**2)
        return plan_part(size, changed, PartSize(tokens, scores, tokens), numbers)

    gc.collect()  # an earlier run's model, in circles of references
    plan, available = replan(settings), room()
    limit = allowed_bytes(settings, available)
    way_out = "" if plan.total <= limit else find_way_out(settings, limit, replan, last="take a smaller model")
    if fits and way_out:
        raise does_not_fit(plan, limit, way_out)
    return PreparedPretraining(settings, raw, config, tokenizer, place, corpus, plan, available, way_out)


def with_full_paths(settings: PretrainSettings) -> PretrainSettings:
    """Paths made independent of the working folder, so that a run can go on from another."""
    changed: dict[str, Any] = {}
    for name in ("data", "phase2_data"):
        mix = shares(getattr(settings, name))
        changed[name] = tuple(f"{absolute_path(folder)}={share!r}" for folder, share in mix.items())
    for name in ("config", "tokenizer", "valid", "output"):
        given = getattr(settings, name)
        if given and (
            name in ("valid", "output") or (os.path.exists(absolute_path(given)) and given.lower() != "tiny")
        ):
            changed[name] = absolute_path(given)
    return dataclasses.replace(settings, **changed)


def _read_config(settings: PretrainSettings) -> tuple[dict[str, Any], Config, Path]:
    """The config without what says how weights are packed, and the directory with the tokenizer."""
    given = Path(settings.config)
    file = given if given.is_file() else hub.resolve(settings.config, weights=False) / "config.json"
    raw = read_json(file)
    for key in ("quantization", "quantization_config"):
        raw.pop(key, None)
    place = hub.resolve(settings.tokenizer, weights=False) if settings.tokenizer else file.parent
    return raw, parse_config(raw, str(file)), place


def start_pretraining(
    settings: PretrainSettings,
    *,
    resume: bool = False,
    force: bool = False,
    notify: Notify | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_validation: Validated | None = None,
    on_sample: Callable[[str, str], None] | None = None,
) -> Result:
    """Run to the end, or to Ctrl-C, which saves and stops. See `pretrain`."""
    refuse_fork()
    group = mx.distributed.init()
    first = group.rank() == 0
    output = Path(absolute_path(settings.output))
    if first:
        check_folder(output, resume)
    prepared = prepare_pretraining(settings, group.size(), fits=not force)
    if first and notify:
        for note in prepared.notes:
            notify(note)
    elif first:
        for note in prepared.warnings:
            warnings.warn(note, stacklevel=3)
    return execute(
        _job(prepared, output),
        resume=resume,
        notify=notify,
        on_step=on_step,
        on_validation=on_validation,
        on_sample=on_sample,
    )


def load_fresh(prepared: PreparedPretraining) -> Model:
    """The model that a run begins with."""
    settings = prepared.settings
    model = fresh_model(prepared.config, settings.seed, settings.init_std or STD)
    if settings.dtype is not None:
        model.set_dtype(DTYPES[settings.dtype])
    for layer in model.layers:
        layer.residual_dropout = settings.dropout
    return model


def course_of(prepared: PreparedPretraining) -> Course:
    """What a run does in its steps."""
    settings, batches = prepared.settings, prepared.corpus.batches
    rate = functools.partial(rate_of, settings, steps=batches.steps)
    return Course(NextToken(), batches, make_pretraining_optimizer(settings), rate)


def _job(prepared: PreparedPretraining, output: Path) -> TrainingJob:
    corpus = prepared.corpus

    def load() -> tuple[Model, Write]:
        model = load_fresh(prepared)

        def write(directory: Path, step: int) -> None:
            """Write the model of a step as a model directory."""
            write_pretrained(directory, model, prepared.raw_config, prepared.tokenizer_directory)

        return model, write

    def figures(loss: float) -> dict[str, float]:
        return {"bits_per_character": loss * corpus.tokens_per_character / math.log(2)}

    return TrainingJob(
        prepared.settings,
        output,
        prepared.tokenizer,
        corpus.train,
        corpus.valid,
        prepared.identity,
        {"config": prepared.raw_config},
        prepared.notes,
        load,
        "pretrain",
        "model",
        course_of(prepared),
        figures,
    )
