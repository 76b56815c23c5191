"""What a fine-tuning run can be told, in one place: the Python function, the command line and run.yaml all read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from ..adapters.config import STRONGEST, WEAKEST
from ..adapters.folder import read_config_of, trained_on
from ..adapters.lora import scale_of
from ..errors import OptionError
from ..option import DTYPE_NAMES, Range, option
from ..paths import expanded
from ..values import path, refusal, shown, text, whole
from .examples import Overflow, TrainOn
from .onward import decided_by
from .run_settings import COUNT, LENGTH, NOT_NEGATIVE, SEED, SHARE, SOME, RunSettings, from_mapping

Order = Literal["shuffle", "bucket"]
METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant")
OBJECTIVES = ("sft", "dpo", "orpo", "simpo", "kto")
DPO_LOSSES, BEST_BY = ("sigmoid", "ipo"), ("loss", "accuracy")
HOLDOUT = 0.05  # by default
_PREFERENCE_RATE = 2e-5  # preferences move a model that can answer already: a tenth of what teaching it takes
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dropout", "targets", "layers")  # mean nothing where all weights are trained
_DECAYING = ("adamw", "lion", "muon", "sgd")
_LESS_THAN_HALF = Range(lambda n: 0 <= n < 0.5, "0 or more, below 0.5")


def _model(value: Any, name: str) -> str:
    return path(value, name, "the name or directory of a model (not a loaded one)")


def _data(value: Any, name: str) -> str:
    return path(value, name, "the path of a .jsonl file or of a directory with one (write examples there, one a line)")


def _layers(value: Any, name: str) -> str:
    """A range, or the number of a layer alone."""
    try:
        return text(value, name) if isinstance(value, str) else str(whole(value, name))
    except OptionError as error:
        raise refusal(value, name, "a range such as 8-15, or a whole number") from error


@dataclass(frozen=True)
class Settings(RunSettings):
    """All settings of a fine-tuning; the fields' help texts are the command line's. Raises OptionError."""

    model: str = option(
        "tiny",
        "A name of `phi3-mlx models`, a directory, or a Hugging Face repository.",
        read=_model,
        flags="-m --model",
        metavar="NAME",
    )
    data: str = option(
        "",
        "A .jsonl file, or a directory with train.jsonl and perhaps valid.jsonl.",
        read=_data,
        flags="-d --data",
        metavar="DATA",
    )
    output: str = option(
        "",
        "The folder for the adapter, checkpoints, metrics and the loss plot.",
        read=path,
        flags="-o --output",
        metavar="DIR",
    )
    revision: str | None = option(None, "A branch, tag or commit of the repository.", metavar="REV")
    valid: str | None = option(None, "A .jsonl file to validate on.", read=_data, metavar="FILE")
    holdout: float = option(HOLDOUT, "Without validation data, this share of the examples is held out; 0: none.", SHARE)

    objective: str = option(
        "sft",
        "sft learns answers; dpo, orpo and simpo which of two is better; kto whether one is good.",
        choices=OBJECTIVES,
    )
    beta: float | None = option(
        None, "Strength of a preference against the reference or likelihood; by default 0.1, simpo 2.", SOME
    )
    dpo_loss: str = option(
        "sigmoid", "The loss of dpo: ipo aims at a margin, and does not push it further.", choices=DPO_LOSSES
    )
    label_smoothing: float = option(
        0.0, "The share of dpo's pairs that is taken to be the wrong way round.", _LESS_THAN_HALF
    )
    simpo_gamma: float = option(0.5, "The margin that simpo wants between the two rewards.", NOT_NEGATIVE)
    desirable_weight: float = option(1.0, "What kto's good answers weigh.", NOT_NEGATIVE)
    undesirable_weight: float = option(1.0, "What kto's bad answers weigh.", NOT_NEGATIVE)
    best_by: str = option(
        "loss",
        "What the best checkpoint has best; accuracy: how often the chosen answer has the larger reward.",
        choices=BEST_BY,
    )

    method: str = option("lora", "What is trained; full needs an unquantized model.", choices=METHODS)
    from_adapter: str | None = option(
        None, "Train on from this adapter: method, rank, strength and layers are its own.", read=path, metavar="DIR"
    )
    rank: int = option(8, "Rank of every low-rank change.", COUNT)
    alpha: float = option(16.0, "Strength: the change is multiplied by alpha / rank.", SOME)
    rslora: bool = option(False, "Multiply by alpha / sqrt(rank) instead, so that higher ranks learn as fast.")
    dropout: float = option(0.0, "Share of a layer's inputs that are dropped at random before the change.", SHARE)
    targets: tuple[str, ...] = option(
        (), "A layer to change, or a part of a fused one (q_proj); may be repeated. By default all.", flags="--target"
    )
    layers: str | None = option(
        None, "Decoder layers to change: 8-15, 8- (to the last), -8 (the last eight).", read=_layers, metavar="RANGE"
    )

    train_on: str = option(
        "answers", "Which tokens are trained: every answer, the last answer, all.", choices=get_args(TrainOn)
    )
    max_length: int | None = option(
        None, "Tokens of the longest example; by default 2,048 or the model's context.", LENGTH
    )
    overflow: str = option("drop", "What to do with longer ones.", choices=get_args(Overflow))
    batch_size: int = option(8, "Examples in one optimizer step.", COUNT)
    accumulate: int = option(1, "Split a batch into this many parts: less memory, the same result.", COUNT)
    order: str = option("shuffle", "bucket: examples of one length together.", choices=get_args(Order))
    epochs: float = option(3.0, "How many times every example is used.", SOME)
    steps: int | None = option(None, "Optimizer steps, instead of epochs.", COUNT)

    optimizer: str = option("adamw", "muon: the layers' matrices by Muon, all else by AdamW.", choices=OPTIMIZERS)
    learning_rate: float = option(
        2e-4, "The peak learning rate, reached after the warm-up; of preferences 2e-05 by default.", SOME
    )
    muon_rate: float | None = option(
        None, "Muon's peak learning rate, where AdamW has weights too; by default the same as AdamW's.", SOME
    )
    schedule: str = option("cosine", "How the learning rate falls to 0.", choices=SCHEDULES)
    warmup: int | None = option(None, "Steps over which it rises; by default 3 % of all.", NOT_NEGATIVE)
    weight_decay: float = option(0.01, "Weight decay of adamw, lion, muon and sgd.", NOT_NEGATIVE)
    clip: float = option(1.0, "Clip the gradient norm at this value; 0: off.", NOT_NEGATIVE)
    seed: int = option(0, "Repeats the run bit for bit on the same machine.", SEED)

    dtype: str | None = option(None, "Compute in this type; by default as `generate` does.", choices=DTYPE_NAMES)

    required: ClassVar[tuple[str, ...]] = ("model", "data", "output")

    def check(self) -> Settings:
        super().check()
        scale = scale_of(self.alpha, self.rank, self.rslora)
        if self.method != "full" and not WEAKEST <= scale <= STRONGEST:
            raise OptionError(
                f"alpha {self.alpha:g} with rank {self.rank} multiplies what is learnt by {scale:g}, and an adapter's "
                f"scale is from {WEAKEST:g} to {STRONGEST:g}; give another"
            )
        if self.objective != "sft" and self.overflow == "split":
            raise OptionError(
                f"overflow split takes answers apart, and {self.objective} learns from whole ones; "
                "give drop or truncate"
            )
        if self.objective == "kto" and self.batch_size < 2:
            raise OptionError("batch_size 1 leaves kto no other answer to estimate the KL by; give 2 or more")
        return self

    def decided(self, given: Collection[str]) -> dict[str, Any]:
        return {**_decided(self, given), **self._of_objective(given)}

    def _of_objective(self, given: Collection[str]) -> dict[str, Any]:
        """What the objective decides."""
        if self.objective == "sft":
            return {}
        decided = {"dropout": 0.0}  # whatever a file, or the adapter that it begins with, says
        return decided if "learning_rate" in given else {**decided, "learning_rate": _PREFERENCE_RATE}

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.method == "full":
            yield from ((name, "with method='full', which trains all weights") for name in _OF_ADAPTERS)
        if self.optimizer != "muon":
            yield "muon_rate", f"with optimizer='{self.optimizer}'"
        elif self.method == "lora":
            yield "muon_rate", "with method='lora', where Muon has all weights and learning_rate is its own"
        if self.optimizer not in _DECAYING:
            yield "weight_decay", f"with optimizer='{self.optimizer}'"
        yield from self._without_effect_on_preferences()
        if self.steps is not None:
            yield "epochs", f"with steps={self.steps}"
        if self.valid is not None:
            yield "holdout", "where valid data are given"
        if not self.samples:
            yield "sample_tokens", "without a prompt in samples"

    def _without_effect_on_preferences(self) -> Iterator[tuple[str, str]]:
        objective = self.objective
        of_one = {"dpo": ("dpo_loss", "label_smoothing"), "simpo": ("simpo_gamma",),
                  "kto": ("desirable_weight", "undesirable_weight")}  # fmt: skip
        for other, names in of_one.items():
            if other != objective:
                yield from ((name, f"with objective='{objective}'") for name in names)
        if objective == "dpo" and self.dpo_loss == "ipo":
            yield "label_smoothing", "with dpo_loss='ipo'"
        if objective == "sft":
            yield "beta", "with objective='sft'"
        else:
            yield "train_on", f"with objective='{objective}', which learns from whole answers"
            yield "dropout", f"with objective='{objective}', which compares with the model as it was, without dropout"
        if objective in ("sft", "kto"):
            yield "best_by", f"with objective='{objective}', which has no pairs"

    def changed(self, before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> str | None:
        """The first of the settings `now` that is another than a run of `before` wrote down, and what it was.

        Those that did nothing then, which older versions let be, do not count.
        """
        run = from_stored(before, source)
        stored, idle = run.as_dict(), dict(run.without_effect())
        differ = (name for name in now if now[name] != stored[name] and name not in idle)
        return next((f"setting ({name} was {stored[name]!r})" for name in differ), None)


def _decided(said: Settings, given: Collection[str]) -> dict[str, Any]:
    """What the adapter that a run begins with decides. Raises OptionError where another value was given."""
    if said.from_adapter is None:
        return {}
    directory = expanded(said.from_adapter)
    decided = decided_by(directory)
    if "dropout" in given:  # of the arrays it says nothing
        decided.pop("dropout", None)
    for name, fixed in decided.items():
        value = getattr(said, name)
        if name in given and value != fixed:
            raise OptionError(f"{name} {shown(value)} is not that of {directory}, {shown(fixed)}; leave it out")
    if "model" not in given:
        decided["model"], decided["revision"] = trained_on(directory, read_config_of(directory), said.revision)
    return decided


def from_stored(given: Mapping[Any, Any], source: str) -> Settings:
    """The settings that a run wrote down; those that did not exist then have their defaults.

    Version 0.1.0 wrote a flag of its command line as the text "True", and trained by it. Raises OptionError.
    """
    flags = {field.name for field in fields(Settings) if field.type == "bool"}
    mended = {key: True if key in flags and value == "True" else value for key, value in given.items()}
    return Settings(**from_mapping(mended, source, Settings))
