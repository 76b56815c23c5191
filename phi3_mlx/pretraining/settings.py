"""What a pretraining run can be told: the Python function and the command line read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import OptionError
from ..option import DTYPE_NAMES, Range, option
from ..tuning.run_settings import COUNT, LENGTH, NOT_NEGATIVE, SEED, SHARE, SOME, RunSettings, from_mapping
from ..values import path, shown

PRETRAIN_OPTIMIZERS = ("adamw", "muon")
PRETRAIN_SCHEDULES = ("cosine", "wsd", "linear", "constant")
_UP_TO_1 = Range(lambda n: 0 <= n <= 1, "0 to 1")
_BETA = Range(lambda n: 0 < n < 1, "more than 0, below 1")


@dataclass(frozen=True)
class PretrainSettings(RunSettings):
    """All settings of a pretraining run; the fields' help texts are the command line's. Raises OptionError."""

    config: str = option(
        "",
        "A config.json, a directory with one, or a model's name: its shape is taken, not its weights.",
        read=path,
        metavar="CONFIG",
    )
    data: tuple[str, ...] = option(
        (),
        "A folder of token shards, and its share of the tokens; may be repeated.",
        flags="-d --data",
        metavar="DIR[=SHARE]",
    )
    output: str = option(
        "",
        "The folder for the model, checkpoints, metrics and the loss plot.",
        read=path,
        flags="-o --output",
        metavar="DIR",
    )
    tokenizer: str | None = option(
        None, "A model whose tokenizer the shards have, if there is none beside CONFIG.", read=path, metavar="NAME"
    )
    valid: str | None = option(None, "Token shards to validate on.", read=path, metavar="DIR")
    holdout: float = option(0.01, "Without these, the share of the documents that is held out; 0: none.", SHARE)

    phase2_data: tuple[str, ...] = option(
        (), "The mix of the second phase, as -d has that of the first; may be repeated.", metavar="DIR[=SHARE]"
    )
    phase2_from: float = option(0.8, "The share of the steps after which the second phase begins.", _UP_TO_1)
    phase2_rate: float | None = option(
        None, "The second phase's peak learning rate; by default the first's. Muon's changes in the same ratio.", SOME
    )

    max_length: int | None = option(
        None, "Tokens that a row has room for; by default 512 or the model's context.", LENGTH
    )
    batch_size: int = option(32, "Rows in one optimizer step.", COUNT)
    accumulate: int = option(1, "Split a batch into this many parts: less memory, the same result.", COUNT)
    epochs: float = option(1.0, "How many times as many rows as there are.", SOME)
    steps: int | None = option(None, "Optimizer steps, instead of epochs.", COUNT)
    tokens: int | None = option(None, "About this many tokens, instead of epochs.", Range(lambda n: n > 0, "1 or more"))

    optimizer: str = option(
        "adamw", "muon: the layers' matrices by Muon, all else by AdamW.", choices=PRETRAIN_OPTIMIZERS
    )
    learning_rate: float = option(1e-3, "AdamW's peak learning rate.", SOME)
    muon_rate: float = option(0.02, "Muon's peak learning rate.", SOME)
    beta2: float = option(0.95, "AdamW's memory of squared gradients.", _BETA)
    schedule: str = option(
        "cosine", "How the rates fall after the warm-up; wsd: in the last steps alone.", choices=PRETRAIN_SCHEDULES
    )
    warmup: int | None = option(None, "Steps over which they rise; by default 1 % of all.", NOT_NEGATIVE)
    decay: float = option(0.2, "The share of the steps in which wsd falls.", _UP_TO_1)
    final_rate: float = option(0.0, "The share of the peak that is left at the end.", _UP_TO_1)
    weight_decay: float = option(0.1, "Weight decay of all but norms and biases.", NOT_NEGATIVE)
    clip: float = option(1.0, "Clip the gradient norm at this value; 0: off.", NOT_NEGATIVE)
    dropout: float = option(0.0, "Share that is dropped of what attention and feed-forward parts add.", SHARE)
    init_std: float | None = option(
        None, "Deviation of the weights to begin with; by default the config's initializer_range, or 0.02.", SOME
    )
    seed: int = option(0, "Of weights, rows and dropout; repeats the run bit for bit on the same machine.", SEED)

    dtype: str | None = option(None, "Compute in this type; float32 by default.", choices=DTYPE_NAMES)

    required: ClassVar[tuple[str, ...]] = ("config", "data", "output")
    method: ClassVar[str] = "full"
    best_by: ClassVar[str] = "loss"

    def check(self) -> PretrainSettings:
        super().check()
        for mix in (self.data, self.phase2_data):
            shares(mix)
        return self

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.optimizer != "muon":
            yield "muon_rate", f"with optimizer='{self.optimizer}'"
        if self.schedule != "wsd":
            yield "decay", f"with schedule='{self.schedule}'"
        if self.schedule == "constant":
            yield "final_rate", "with schedule='constant'"
        if not self.phase2_data and self.phase2_rate is None:
            yield "phase2_from", "without a second phase"
        if self.valid is not None:
            yield "holdout", "where validation data are given"
        elif not self.holdout:
            yield from ((name, "where nothing is held out to validate on") for name in ("patience", "samples"))
        if self.steps is not None:
            yield from ((name, f"with steps={self.steps}") for name in ("tokens", "epochs"))
        elif self.tokens is not None:
            yield "epochs", f"with tokens={self.tokens}"
        if not self.samples:
            yield "sample_tokens", "without a prompt in samples"

    def warmup_steps(self, steps: int) -> int:
        """Of a run of `steps`, those over which the rates rise."""
        return round(0.01 * steps) if self.warmup is None else self.warmup

    def phase2_step(self, steps: int) -> int:
        """The first step of the second phase."""
        return round(self.phase2_from * steps)


def pretraining_from(given: Mapping[Any, Any], source: str) -> PretrainSettings:
    """The settings that a run wrote down. Raises OptionError."""
    return PretrainSettings(**from_mapping(given, source, PretrainSettings))


def shares(data: tuple[str, ...]) -> dict[str, float]:
    """Folders and their shares, of texts such as "stories=0.7"; a folder alone has the share 1. Raises OptionError."""
    result: dict[str, float] = {}
    for given in data:
        folder, equals, share = given.rpartition("=")
        if not equals or os.path.isdir(os.path.expanduser(given)):
            folder, share = given, "1"
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not folder or not 0 < number < float("inf"):
            raise OptionError(f"data {shown(given)} has no share that is a number greater than 0; write DIR=0.5")
        if folder in result:
            raise OptionError(f"data {shown(folder)} is given twice; give it once, with the sum of the shares")
        result[folder] = number
    return result
