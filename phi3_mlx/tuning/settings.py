"""What a fine-tuning run can be told, in one place: the Python function, the command line and run.yaml all read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..checkpoint import DTYPES
from ..errors import OptionError
from ..files import read_text
from ..memory import parse_size
from .batches import Order
from .examples import Overflow, TrainOn

METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant")


def _option(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the fields' help texts are the command line's. `check` raises OptionError."""

    model: str = _option("tiny", "A name of `phi3-mlx models`, a directory, or a Hugging Face repository.")
    data: str = _option("", "A .jsonl file, or a directory with train.jsonl and perhaps valid.jsonl.")
    output: str = _option("", "Where the adapter goes, with checkpoints, metrics and the loss plot.")
    revision: str | None = _option(None, "A branch, tag or commit of the repository.")
    valid: str | None = _option(None, "A .jsonl file to validate on.")
    holdout: float = _option(0.05, "Without validation data, this share of the examples is held out; 0: none.")

    method: str = _option("lora", "What is trained; full needs an unquantized model.", choices=METHODS)
    rank: int = _option(8, "Components of every low-rank change.")
    alpha: float = _option(16.0, "Strength: the change is multiplied by alpha / rank.")
    rslora: bool = _option(False, "Multiply by alpha / sqrt(rank) instead, so that higher ranks learn as fast.")
    dropout: float = _option(0.0, "Share of a layer's inputs that the change does not see, drawn every step.")
    targets: tuple[str, ...] = _option(
        (), "A layer to change, or a part of a fused one (q_proj); may be repeated. By default all."
    )
    layers: str | None = _option(None, "Decoder layers to change: 8-15, 8- (to the last), -8 (the last eight).")

    train_on: str = _option(
        "answers", "Whose tokens are learnt: every answer, the last, all.", choices=get_args(TrainOn)
    )
    max_length: int | None = _option(None, "Tokens of the longest example; by default 2,048 or the model's context.")
    overflow: str = _option("drop", "What becomes of longer ones.", choices=get_args(Overflow))
    batch_size: int = _option(8, "Examples an optimizer step learns from.")
    accumulate: int = _option(1, "Compute a batch in so many parts: less memory, the same result.")
    order: str = _option("shuffle", "bucket: examples of one length together.", choices=get_args(Order))
    epochs: float = _option(3.0, "How often every example is read.")
    steps: int | None = _option(None, "Optimizer steps, instead of epochs.")

    optimizer: str = _option("adamw", "Which optimizer.", choices=OPTIMIZERS)
    learning_rate: float = _option(2e-4, "The highest one, reached after the warm-up.")
    schedule: str = _option("cosine", "How the learning rate falls to 0.", choices=SCHEDULES)
    warmup: int | None = _option(None, "Steps in which it rises; by default 3 % of them.")
    weight_decay: float = _option(0.01, "Of adamw, lion, muon and sgd.")
    clip: float = _option(1.0, "Longest gradient; longer ones are shortened to it; 0: never.")
    seed: int = _option(0, "Repeats the run bit for bit on the same machine.")

    validate_every: int | None = _option(None, "Steps between validations; by default an epoch, at most 100 steps.")
    save_every: int | None = _option(None, "Steps between checkpoints; by default as often as validations.")
    patience: int | None = _option(None, "Stop after so many validations without a better one.")
    samples: tuple[str, ...] = _option((), "A prompt to answer at every validation; may be repeated.")
    sample_tokens: int = _option(64, "Longest such answer.")

    gradient_checkpointing: bool = _option(False, "Compute activations again in the backward pass: less memory.")
    dtype: str | None = _option(None, "Compute in this type; by default as `generate` does.", choices=tuple(DTYPES))
    memory: str | None = _option(None, "Use at most this much, such as 16GB, and never more than the machine has free.")
    tensorboard: bool = _option(False, "Write TensorBoard files too (needs the extra of that name).")

    def check(self) -> Settings:
        """Itself, or OptionError naming the first setting outside its range."""
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise OptionError(f"{one.name} {value!r} is unknown; choose {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise OptionError(f"{one.name} {value} is no number to train with; give a finite one")
        for name in ("data", "output"):
            if not getattr(self, name):
                raise OptionError(f"{name} is missing; name it")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"{name} {value} is outside its range; give more than 0")
        if self.memory is not None:
            parse_size(self.memory)
        for name in ("weight_decay", "clip", "warmup", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise OptionError(f"{name} {value} is outside its range; give 0 or more")
        for name in ("holdout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)} is outside its range; give 0 or more, below 1")
        if self.max_length is not None and self.max_length < 2:
            raise OptionError(f"max_length {self.max_length} leaves nothing to predict; give 2 or more")
        if self.accumulate > self.batch_size:
            raise OptionError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}; lower it")
        if any(not sample.strip() for sample in self.samples):
            raise OptionError("a sample prompt is empty; give some text")
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tuples become lists."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


_POSITIVE = (
    "rank",
    "alpha",
    "batch_size",
    "accumulate",
    "epochs",
    "steps",
    "learning_rate",
    "validate_every",
    "save_every",
    "patience",
    "sample_tokens",
)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a YAML file names, checked by name and type. Raises OptionError naming the file and the key."""
    import yaml

    try:
        value = yaml.safe_load(read_text(path))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}; name a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise OptionError(f"{path} holds no settings; write lines such as `data: my.jsonl`")
    return from_mapping(value, str(path))


def from_mapping(given: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """`given` with every value of its setting's type. Raises OptionError, naming `source`."""
    known = {one.name: one for one in fields(Settings)}
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise OptionError(f"{source}: unknown setting {unknown[0]!r}; {hint}")
    return {key: _typed(value, str(known[key].type), f"{source}: {key}") for key, value in given.items()}


def _typed(value: Any, kind: str, where: str) -> Any:
    """`value` as the annotation `kind` has it."""
    if value is None and kind.endswith("| None"):
        return None
    name = kind.removesuffix(" | None")
    if name.startswith("tuple"):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif name == "float":
        # YAML reads 1e-4, without a point, as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif name == "str" and isinstance(value, (int, str)) and not isinstance(value, bool):
        return str(value)  # `layers: 3`
    elif (name == "int" and type(value) is int) or (name == "bool" and isinstance(value, bool)):
        return value
    expected = {"tuple[str, ...]": "a list of texts", "float": "a number", "int": "a whole number"}
    expected |= {"bool": "true or false", "str": "a text"}
    raise OptionError(f"{where} is {value!r}; expected {expected[name]}")
