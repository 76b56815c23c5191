"""What a fine-tuning run can be told, in one place: the Python function, the command line and run.yaml all read it.

Every value comes in by one door: a `Settings` holds values of its fields' types, whoever made it, and `Settings.of`
takes what a user gave, and refuses what would do nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..adapters.config import STRONGEST, WEAKEST
from ..adapters.folder import read_config_of, trained_on
from ..adapters.lora import scale_of
from ..errors import OptionError
from ..fields import shorten
from ..files import read_text
from ..option import DTYPE_NAMES, Option, Range, check, option, read
from ..sizes import parse_size
from ..values import number, path, refusal, shown, text, whole
from .examples import Overflow, TrainOn
from .onward import decided_by

if TYPE_CHECKING:
    import yaml

Order = Literal["shuffle", "bucket"]
METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant")
HOLDOUT = 0.05  # by default
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dropout", "targets", "layers")  # mean nothing where all weights are trained
_DECAYING = ("adamw", "lion", "muon", "sgd")
_FLOAT32_MAX = 3.4028235e38

_COUNT = Range(lambda n: 0 < n < 2**31, "1 to 2,147,483,647")
_SOME = Range(lambda n: n > 0, "more than 0")
_NOT_NEGATIVE = Range(lambda n: 0 <= n < 2**31, "0 to 2,147,483,647")
_SHARE = Range(lambda n: 0 <= n < 1, "0 or more, below 1")
_SEED = Range(lambda n: 0 <= n < 2**32, "0 to 4,294,967,295")  # batches and dropout mix it with a step's number
_LENGTH = Range(lambda n: 2 <= n < 2**31, "2 to 2,147,483,647 (of one token nothing is predicted)")


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


def _size(value: Any, name: str) -> int | str:
    """Bytes, or a text such as "16GB"."""
    if isinstance(value, str):
        parse_size(text(value, name))
        return value
    size = number(value, name)
    if not 1000 <= size < math.inf:  # 16 is meant as gigabytes
        raise refusal(value, name, "a size such as 16GB, or a number of bytes from 1,000")
    return int(size)


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the fields' help texts are the command line's.

    Raises OptionError for a value of another type than its field's; `check`, for one outside its range.
    """

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
    holdout: float = option(
        HOLDOUT, "Without validation data, this share of the examples is held out; 0: none.", _SHARE
    )

    method: str = option("lora", "What is trained; full needs an unquantized model.", choices=METHODS)
    from_adapter: str | None = option(
        None, "Train on from this adapter: method, rank, strength and layers are its own.", read=path, metavar="DIR"
    )
    rank: int = option(8, "Rank of every low-rank change.", _COUNT)
    alpha: float = option(16.0, "Strength: the change is multiplied by alpha / rank.", _SOME)
    rslora: bool = option(False, "Multiply by alpha / sqrt(rank) instead, so that higher ranks learn as fast.")
    dropout: float = option(0.0, "Share of a layer's inputs that are dropped at random before the change.", _SHARE)
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
        None, "Tokens of the longest example; by default 2,048 or the model's context.", _LENGTH
    )
    overflow: str = option("drop", "What to do with longer ones.", choices=get_args(Overflow))
    batch_size: int = option(8, "Examples in one optimizer step.", _COUNT)
    accumulate: int = option(1, "Split a batch into this many parts: less memory, the same result.", _COUNT)
    order: str = option("shuffle", "bucket: examples of one length together.", choices=get_args(Order))
    epochs: float = option(3.0, "How many times every example is used.", _SOME)
    steps: int | None = option(None, "Optimizer steps, instead of epochs.", _COUNT)

    optimizer: str = option("adamw", "Which optimizer.", choices=OPTIMIZERS)
    learning_rate: float = option(2e-4, "The peak learning rate, reached after the warm-up.", _SOME)
    schedule: str = option("cosine", "How the learning rate falls to 0.", choices=SCHEDULES)
    warmup: int | None = option(None, "Steps over which it rises; by default 3 % of all.", _NOT_NEGATIVE)
    weight_decay: float = option(0.01, "Weight decay of adamw, lion, muon and sgd.", _NOT_NEGATIVE)
    clip: float = option(1.0, "Clip the gradient norm at this value; 0: off.", _NOT_NEGATIVE)
    seed: int = option(0, "Repeats the run bit for bit on the same machine.", _SEED)

    validate_every: int | None = option(
        None, "Steps between validations; by default an epoch, at most 100 steps.", _COUNT
    )
    save_every: int | None = option(None, "Steps between checkpoints; by default as often as validations.", _COUNT)
    patience: int | None = option(None, "Stop after this many validations without a better loss.", _COUNT)
    samples: tuple[str, ...] = option((), "A prompt to answer at every validation; may be repeated.", flags="--sample")
    sample_tokens: int = option(64, "Most tokens of such an answer.", _COUNT)

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, less memory.")
    dtype: str | None = option(None, "Compute in this type; by default as `generate` does.", choices=DTYPE_NAMES)
    memory: int | str | None = option(
        None,
        "Use at most this much, such as 16GB, and never more than the machine has free.",
        read=_size,
        metavar="SIZE",
    )
    tensorboard: bool = option(False, "Write TensorBoard files too (needs the extra of that name).")

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name), field.name))

    @classmethod
    def of(cls, given: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> Settings:
        """The settings that a user gave, by name; None is not given. `given` overrules those of a `file`.

        Raises OptionError for a value of another type or outside its range, and for one that would do nothing; those of
        the file may do nothing because of `given`.
        """
        file = file or {}
        idle_anyway = {name for name, _ in cls(**file)._without_effect()}
        overruled = file.keys() - given.keys() - idle_anyway
        given = {**file, **given}
        for name in ("model", "data", "output"):
            if name in given and given[name] is None:
                raise OptionError(f"{name} is None; name it")
        given = {name: value for name, value in given.items() if value is not None}
        said = cls(**given)
        settings = dataclasses.replace(said, **_decided(said, given)).check()
        for name, why in settings._without_effect():
            if name in given and name not in overruled and getattr(settings, name):
                raise no_effect(name, given[name], why)
        return settings

    def check(self) -> Settings:
        """Itself, or OptionError naming the first setting outside its range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not abs(value) <= _FLOAT32_MAX:  # NaN is not
                raise OptionError(f"{field.name} {value} is not a number to train with; give a finite one")
            check(field, value)
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise OptionError(f"{name} is missing; name it")
        if self.accumulate > self.batch_size:
            raise OptionError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}; lower it")
        scale = scale_of(self.alpha, self.rank, self.rslora)
        if self.method != "full" and not WEAKEST <= scale <= STRONGEST:
            raise OptionError(
                f"alpha {self.alpha:g} with rank {self.rank} multiplies what is learnt by {scale:g}, and an adapter's "
                f"scale is from {WEAKEST:g} to {STRONGEST:g}; give another"
            )
        if any(not sample.strip() for sample in self.samples):
            raise OptionError("a sample prompt is empty; give some text")
        return self

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        """Names of settings that do nothing beside the others, and why."""
        if self.method == "full":
            yield from ((name, "with method='full', which trains all weights") for name in _OF_ADAPTERS)
        if self.optimizer not in _DECAYING:
            yield "weight_decay", f"with optimizer='{self.optimizer}'"
        if self.steps is not None:
            yield "epochs", f"with steps={self.steps}"
        if self.valid is not None:
            yield "holdout", "where valid data are given"
        if not self.samples:
            yield "sample_tokens", "without a prompt in samples"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tuples become lists."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def no_effect(name: str, value: Any, why: str) -> OptionError:
    """That a setting was given and would do nothing."""
    what = f"{name} {shown(value)}" if isinstance(value, int | float | str) else name
    return OptionError(f"{what} has no effect {why}; leave it out")


def _decided(said: Settings, given: Collection[str]) -> dict[str, Any]:
    """What the adapter that a run begins with decides. Raises OptionError where another value was given."""
    if said.from_adapter is None:
        return {}
    directory = Path(said.from_adapter).expanduser()
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


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a YAML file names, checked by name and type. Raises OptionError naming the file and the key."""
    import yaml

    try:
        value = yaml.load(read_text(path), _yaml_loader())
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}; name a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise OptionError(f"{path} is not valid YAML: it is nested too deeply") from error
    except _YAML_ERRORS as error:
        raise OptionError(f"{path} is not valid YAML: a value is none of the type that it looks like") from error
    if not isinstance(value, dict):
        raise OptionError(f"{path} holds no settings; write lines such as `data: my.jsonl`")
    return from_mapping(value, str(path))


# Of PyYAML's constructors, for a value that does not fit its tag or form: `!!bool x`, `2024-99-99`.
_YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@functools.cache
def _yaml_loader() -> type[yaml.SafeLoader]:
    """A safe loader that reads numbers as YAML 1.2 and people do, 1e-4 as one and 8:30 as none, and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in keys.items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{shorten(twice, quote=False)} is given twice")
            return super().construct_mapping(node, deep)

    # Of another class the list would be shared.
    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in _NUMBERS]
        for first, rules in Loader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _NUMBERS.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list("-+.0123456789"))
    return Loader


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]*)$",  # 010 is 8 for some and 10 for others
    "tag:yaml.org,2002:float": (
        r"(?i)[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(?:e[-+]?[0-9]+)?$|[-+]?\.(?:inf|nan)$"
    ),
}


def from_mapping(given: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """`given` with every value of its setting's type. Raises OptionError, naming `source`."""
    known = {field.name: field for field in fields(Settings)}
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0][:60], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise OptionError(f"{source}: unknown setting {shown(unknown[0])}; {hint}")
    return {key: _typed(known[key], value, f"{source}: {key}") for key, value in given.items()}


def from_stored(given: Mapping[Any, Any], source: str) -> Settings:
    """The settings that a run wrote down; those that did not exist then have their defaults.

    Version 0.1.0 wrote a flag of its command line as the text "True", and trained by it. Raises OptionError.
    """
    flags = {field.name for field in fields(Settings) if field.type == "bool"}
    mended = {key: True if key in flags and value == "True" else value for key, value in given.items()}
    return Settings(**from_mapping(mended, source))


def changed(before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> str | None:
    """The first of the settings `now` that is another than a run of `before` wrote down, and what it was.

    Those that did nothing then, which older versions let be, do not count.
    """
    run = from_stored(before, source)
    stored, idle = run.as_dict(), dict(run._without_effect())
    differ = (name for name in now if now[name] != stored[name] and name not in idle)
    return next((f"setting ({name} was {stored[name]!r})" for name in differ), None)


def _typed(field: Option, value: Any, where: str) -> Any:
    """`value` as the field has it."""
    if isinstance(value, str) and not value and str(field.type).endswith("| None"):
        raise OptionError(f"{where} is empty; say which, or leave it out")
    return read(field, value, where)
