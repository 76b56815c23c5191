"""What fine-tuning and pretraining are told alike, and the one door by which their settings come in.

Settings hold values of their fields' types, whoever made them; `of` takes what a user gave, and refuses what would do
nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from ..errors import OptionError
from ..option import DTYPE_NAMES, Option, Range, check, option, read
from ..sizes import parse_size
from ..values import number, refusal, shown, text

COUNT = Range(lambda n: 0 < n < 2**31, "1 to 2,147,483,647")
SOME = Range(lambda n: n > 0, "more than 0")
NOT_NEGATIVE = Range(lambda n: 0 <= n < 2**31, "0 to 2,147,483,647")
SHARE = Range(lambda n: 0 <= n < 1, "0 or more, below 1")
SEED = Range(lambda n: 0 <= n < 2**32, "0 to 4,294,967,295")  # batches and dropout mix it with a step's number
LENGTH = Range(lambda n: 2 <= n < 2**31, "2 to 2,147,483,647 (of one token nothing is predicted)")
_FLOAT32_MAX = 3.4028235e38

S = TypeVar("S", bound="RunSettings")


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
class RunSettings(ABC):
    """The settings of a run: the fields here, and those of fine-tuning or pretraining, which come before them.

    Raises OptionError for a value of another type than its field's; `check`, for one outside its range.
    """

    validate_every: int | None = option(
        None, "Steps between validations; by default as many as read all data once, at most 100.", COUNT
    )
    save_every: int | None = option(None, "Steps between checkpoints; by default as often as validations.", COUNT)
    patience: int | None = option(None, "Stop after this many validations that were not better.", COUNT)
    samples: tuple[str, ...] = option((), "A prompt to answer at every validation; may be repeated.", flags="--sample")
    sample_tokens: int = option(64, "Most tokens of such an answer.", COUNT)

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, less memory.")
    dtype: str | None = option(None, "Compute in this type.", choices=DTYPE_NAMES)
    memory: int | str | None = option(
        None,
        "Use at most this much, such as 16GB, and never more than the machine has free.",
        read=_size,
        metavar="SIZE",
    )
    tensorboard: bool = option(False, "Write TensorBoard files too (needs the extra of that name).")

    required: ClassVar[tuple[str, ...]] = ("data", "output")

    # What both have, each with its own default and help.
    @property
    @abstractmethod
    def output(self) -> str: ...
    @property
    @abstractmethod
    def max_length(self) -> int | None: ...
    @property
    @abstractmethod
    def batch_size(self) -> int: ...
    @property
    @abstractmethod
    def accumulate(self) -> int: ...
    @property
    @abstractmethod
    def optimizer(self) -> str: ...
    @property
    @abstractmethod
    def clip(self) -> float: ...
    @property
    @abstractmethod
    def dropout(self) -> float: ...
    @property
    @abstractmethod
    def seed(self) -> int: ...

    # What pretraining does in one way alone.
    @property
    @abstractmethod
    def method(self) -> str: ...
    @property
    @abstractmethod
    def best_by(self) -> str: ...

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, typed(field, getattr(self, field.name), field.name))

    @classmethod
    def of(cls: type[S], given: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> S:
        """The settings that a user gave, by name; None is not given. `given` overrules those of a `file`.

        Raises OptionError for a value of another type or outside its range, and for one that would do nothing; those of
        the file may do nothing because of `given`.
        """
        file = file or {}
        idle_anyway = {name for name, _ in cls(**file).without_effect()}
        overruled = file.keys() - given.keys() - idle_anyway
        given = {**file, **given}
        for name in cls.required:
            if name in given and given[name] is None:
                raise OptionError(f"{name} is None; name it")
        given = {name: value for name, value in given.items() if value is not None}
        said = cls(**given)
        settings = dataclasses.replace(said, **said.decided(given)).check()
        for name, why in settings.without_effect():
            if name in given and name not in overruled and getattr(said, name):
                raise no_effect(name, given[name], why)
        return settings

    def check(self: S) -> S:
        """Itself, or OptionError naming the first setting outside its range."""
        for field in in_order(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, float) and not abs(value) <= _FLOAT32_MAX:  # NaN is not
                raise OptionError(f"{field.name} {value} is not a number to train with; give a finite one")
            check(field, value)
        for name in self.required:
            if not getattr(self, name):
                raise OptionError(f"{name} is missing; name it")
        if self.accumulate > self.batch_size:
            raise OptionError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}; lower it")
        if any(not sample.strip() for sample in self.samples):
            raise OptionError("a sample prompt is empty; give some text")
        return self

    @abstractmethod
    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Names of settings that do nothing beside the others, and why."""

    def decided(self, given: Collection[str]) -> dict[str, Any]:
        """What other settings decide, of those that were not `given`."""
        return {}

    def changed(self, before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> str | None:
        """The first of the settings `now` that is another than a run wrote down `before`, and what it was."""
        differ = (name for name in now if now[name] != before.get(name))
        return next((f"setting ({name} was {before.get(name)!r})" for name in differ), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in in_order(type(self))}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def in_order(kind: type[RunSettings]) -> list[Option]:
    """The fields as help pages list them: what all runs have comes last."""
    shared = {field.name for field in fields(RunSettings)}
    return sorted(fields(kind), key=lambda field: field.name in shared)


def from_mapping(given: Mapping[Any, Any], source: str, kind: type[RunSettings]) -> dict[str, Any]:
    """`given` with every value of the type of its setting in `kind`. OptionError, naming `source`."""
    known = {field.name: field for field in in_order(kind)}
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0][:60], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise OptionError(f"{source}: unknown setting {shown(unknown[0])}; {hint}")
    return {key: typed(known[key], value, f"{source}: {key}") for key, value in given.items()}


def typed(field: Option, value: Any, where: str) -> Any:
    """`value` as the field has it."""
    if isinstance(value, str) and not value and str(field.type).endswith("| None"):
        raise OptionError(f"{where} is empty; say which, or leave it out")
    return read(field, value, where)


def no_effect(name: str, value: Any, why: str) -> OptionError:
    """That a setting was given and would do nothing."""
    what = f"{name} {shown(value)}" if isinstance(value, int | float | str) else name
    return OptionError(f"{what} has no effect {why}; leave it out")
