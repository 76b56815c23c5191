"""Pretraining: a model from random weights, on token shards, by fine-tuning's trainer.

import phi3_mlx

phi3_mlx.tokenize_data("notes", "shards", phi3_mlx.load_tokenizer("tiny"))
result = phi3_mlx.pretrain("tiny", "shards", "model", steps=100)
model, tokenizer = phi3_mlx.load("model")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..option import arguments
from ..tuning.events import without_figures
from ..tuning.signals import pass_on
from ..values import check_functions, flag, number, path
from . import run
from .settings import PretrainSettings

if TYPE_CHECKING:
    from ..tuning.events import StepReport
    from ..tuning.execution import Result

__all__ = ["PretrainSettings", "pretrain"]

Mix = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


def pretrain(
    config: str | Path,
    data: Mix,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    valid: str | Path | None = None,
    holdout: float | None = None,
    phase2_data: Mix | None = None,
    phase2_from: float | None = None,
    phase2_rate: float | None = None,
    max_length: int | None = None,
    batch_size: int = PretrainSettings.batch_size,
    accumulate: int = PretrainSettings.accumulate,
    epochs: float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    optimizer: str = PretrainSettings.optimizer,
    learning_rate: float = PretrainSettings.learning_rate,
    muon_rate: float | None = None,
    beta2: float = PretrainSettings.beta2,
    schedule: str = PretrainSettings.schedule,
    warmup: int | None = None,
    decay: float | None = None,
    final_rate: float | None = None,
    weight_decay: float = PretrainSettings.weight_decay,
    clip: float = PretrainSettings.clip,
    dropout: float = PretrainSettings.dropout,
    init_std: float | None = None,
    seed: int = PretrainSettings.seed,
    validate_every: int | None = None,
    save_every: int | None = None,
    patience: int | None = None,
    samples: Sequence[str] | None = None,
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
) -> Result:
    """Train a model from random weights on token shards (of `tokenize_data`) into `output`, a model directory.

    `config` gives the shape: a config.json, a directory with one, or a model's name, whose weights are not read. The
    tokenizer is the one beside it, or of the model `tokenizer`; the shards must have been made with it. `data` is a
    folder of shards, or several with their shares of the tokens; `phase2_data` is the mix of a second phase, which
    begins after the share `phase2_from` of the steps with the peak learning rate `phase2_rate`. The options are those
    of `phi3-mlx pretrain`, whose -h explains each; None is the usual value.

    A row takes whole documents that it has room for (`max_length` tokens), each of which is read by itself. In the end
    `output` has the best model by validation loss, and `output`/last that of the last step. `resume` goes on with the
    interrupted run in `output`, which ends with the weights of one that was never interrupted. `on_step` gets a report
    of every step, `on_validation` (step, loss in nats a token, is it the best).

    Raises DataError, OptionError, ConfigError, TokenizerError, ModelNotFoundError, MemoryLimitError, TrainingError.
    Signals are `tune`'s.
    """
    given = arguments(PretrainSettings, locals()) | {"data": mix_texts(data)}
    if phase2_data is not None:
        given["phase2_data"] = mix_texts(phase2_data)
    settings = PretrainSettings.of(given)
    check_functions(notify=notify, on_step=on_step, on_validation=on_validation)
    result = run.start_pretraining(
        settings,
        resume=flag(resume, "resume"),
        force=flag(force, "force"),
        notify=notify,
        on_step=on_step,
        on_validation=without_figures(on_validation),
    )
    pass_on(result.signal)
    return result


def mix_texts(data: Mix) -> tuple[str, ...]:
    """Folders of shards as the settings have them. Raises OptionError."""
    what = "the name of a folder of token shards"
    if isinstance(data, Mapping):
        return tuple(f"{path(folder, 'data', what)}={number(share, 'a share')!r}" for folder, share in data.items())
    folders = data if isinstance(data, Sequence) and not isinstance(data, (str, bytes)) else [data]
    return tuple(path(folder, "data", what) for folder in folders)
