"""What `convert` is asked for: every value of its type, and none that contradicts another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .. import values
from ..errors import OptionError
from ..sizes import parse_size
from ..store.checkpoint import DTYPES
from .recipes import Recipe, uniform


def _recipe(value: Any, name: str) -> Any:
    return value if isinstance(value, Mapping) else values.path(value, name, "a JSON file, or what it holds")


_REQUIRED: dict[str, Callable[[Any, str], Any]] = {
    "mode": values.text,
    "dequantize": values.flag,
    "method": partial(values.choice, choices=("round", "gptq")),
    "force": values.flag,
    "allow_nan": values.flag,
}
_OPTIONAL: dict[str, Callable[[Any, str], Any]] = {
    "bits": values.whole,
    "group_size": values.whole,
    "dtype": partial(values.choice, choices=DTYPES),
    "target_bpw": values.number,
    "recipe": _recipe,
    "calibration": values.text,
    "text": values.text,
    "report": values.flag,
}


@dataclass(frozen=True)
class Options:
    """The options of `convert`, which explains them.

    Raises OptionError for a value of the wrong type, for two that contradict each other, and for one without effect.
    """

    bits: int | None
    group_size: int | None
    mode: str
    dtype: str | None
    dequantize: bool
    target_bpw: float | None
    target_size: int | str | None
    recipe: str | Path | Mapping[str, Any] | None
    method: str
    calibration: str | None
    text: str | None
    report: bool | None
    force: bool
    allow_nan: bool

    def __post_init__(self) -> None:
        for name, read in _REQUIRED.items():
            object.__setattr__(self, name, read(getattr(self, name), name))
        for name, read in _OPTIONAL.items():
            object.__setattr__(self, name, values.optional(read, getattr(self, name), name))
        _ = self.target_bytes  # refuses what is no size
        self._check_one_decides()
        if self.text is not None and not self.wants_report:
            asks = "; report=True asks for one" if self.report is None else ""
            raise OptionError(f"text has no effect where no report is made{asks}; leave it out")
        _ = self.uniform  # refuses what mlx does not have
        if self.calibration is not None and not self.reads_text:
            raise OptionError(
                "calibration has no effect without method='gptq', target_bpw=X or target_size=SIZE; leave it out"
            )

    @cached_property
    def uniform(self) -> Recipe:
        """The recipe that `bits`, `group_size` and `mode` ask for, or that of their defaults."""
        return uniform(self.bits, self.group_size, self.mode)

    @property
    def target_bytes(self) -> int | None:
        return None if self.target_size is None else parse_size(self.target_size)

    @property
    def has_target(self) -> bool:
        """Whether bits are chosen layer by layer, from a measurement."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def reads_text(self) -> bool:
        """Whether bits or rounding are fitted to a text."""
        return self.method == "gptq" or self.has_target

    @property
    def names_packing(self) -> bool:
        """Whether anything says how to pack, so that a quantized source would be quantized again."""
        return any((self.bits, self.group_size, self.has_target, self.recipe)) or self.mode != "affine"

    @property
    def wants_report(self) -> bool:
        """Whether a report is made, if only where it fits in memory."""
        return self.report is True or (self.report is None and not self.dequantize)

    def _check_one_decides(self) -> None:
        """OptionError where two options decide the same; the first of them is named."""
        given = {
            "bits": self.bits,
            "group_size": self.group_size,
            "mode": None if self.mode == "affine" else self.mode,
            "target_bpw": self.target_bpw,
            "target_size": self.target_size,
            "recipe": "FILE" if isinstance(self.recipe, Mapping) else self.recipe,
            "method": None if self.method == "round" else self.method,
        }
        named = {name: f"{name}={value}" for name, value in given.items() if value is not None}
        if self.dequantize and named:
            first = next(iter(named.values()))
            raise OptionError(f"dequantize=True writes plain weights, so it has no use for {first}; leave one out")
        plans = [name for name in named if name in ("target_bpw", "target_size", "recipe")]
        if len(plans) > 1:
            raise OptionError(
                f"{named[plans[0]]} and {named[plans[1]]} each decide the bits of every layer; leave one out"
            )
        decided = ("bits", "group_size", "mode") if self.recipe is not None else ("bits", "mode")
        clash = next((name for name in decided if plans and name in named), None)
        if clash:
            raise OptionError(f"{named[plans[0]]} decides what {named[clash]} would; leave one out")
