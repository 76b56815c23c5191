"""What `convert` and `fuse` can be told. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import values
from ..errors import OptionError
from ..option import DTYPE_NAMES, option, settle
from ..sizes import parse_size

if TYPE_CHECKING:
    from .recipes import Recipe

_METHODS = ("round", "gptq")
_BITS = (2, 3, 4, 5, 6, 8)
_read_dtype = partial(values.choice, choices=DTYPE_NAMES)


def _recipe(value: Any, name: str) -> Any:
    return value if isinstance(value, Mapping) else values.path(value, name, "a JSON file, or what it holds")


def _size(value: Any, name: str) -> int | str:
    parse_size(value)  # refuses what is no size
    return value  # as messages repeat it


def _model(value: Any, name: str) -> str:
    return values.path(value, name, "the name or directory of a model")


@dataclass(frozen=True)
class ConvertOptions:
    """What `convert` can be told, which explains it.

    Raises OptionError for a value of the wrong type, for two that contradict each other, and for one without effect.
    """

    bits: int | None = option(None, "Bits a weight. Without it: 4.", offered=_BITS)
    group_size: int | None = option(None, "Weights that share a scale. Without it: 64.", offered=(32, 64, 128))
    mode: str = option(
        "affine",
        "affine: integers with scale and bias; the others are floating formats with bits and group of their own.",
        offered=("affine", "mxfp4", "mxfp8", "nvfp4"),
    )
    dtype: str | None = option(
        None,
        "Type of all that is not quantized, scales included. Without it: the model's own.",
        choices=DTYPE_NAMES,
        read=_read_dtype,
    )
    dequantize: bool = option(False, "Write weights in floats, projections fused.")
    target_bpw: float | None = option(None, "Choose bits layer by layer: X bits a weight in all.", metavar="X")
    target_size: int | str | None = option(None, "The same by size: 2.0GB.", read=_size, metavar="SIZE")
    recipe: str | Path | Mapping[str, Any] | None = option(
        None, "Bits layer by layer as in this file: recipe.json of an earlier run.", read=_recipe, metavar="FILE"
    )
    method: Literal["round", "gptq"] = option(
        "round",
        "gptq: round so that the layers' outputs on a text change least; slower, better.",
        choices=_METHODS,
        read=partial(values.choice, choices=_METHODS),
    )
    calibration: str | None = option(
        None, "The text that gptq and --target-… read. Without it: a sample.", metavar="FILE"
    )
    text: str | None = option(None, "The text that the report reads. Without it: another sample.", metavar="FILE")
    report: bool | None = option(
        None,
        "Compare with SRC on the text and write REPORT.md; done without asking where both fit in memory.",
        flags="--report/--no-report",
    )
    force: bool = option(False, "Go on where DST exists already (it is replaced) or there is too little memory.")
    allow_nan: bool = option(False, "Convert weights that are NaN or infinite.")
    revision: str | None = option(None, "A branch, tag or commit of the repository.", metavar="REV")

    def __post_init__(self) -> None:
        settle(self)
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
        from .recipes import uniform

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


@dataclass(frozen=True)
class FuseOptions:
    """What `fuse` can be told, which explains it. Raises OptionError for a value of the wrong type."""

    model: str | None = option(
        None,
        "The model it was trained on; by default as the adapter names it.",
        read=_model,
        flags="-m --model",
        metavar="NAME",
    )
    revision: str | None = option(None, "A branch, tag or commit of the repository.", metavar="REV")
    dequantize: bool = option(False, "Write floats: all of the adapter is kept.")
    dtype: str | None = option(
        None, "Type of the floats. Without it: the model's own.", choices=DTYPE_NAMES, read=_read_dtype
    )
    bits: int | None = option(
        None, "Quantize the changed layers to this many bits. Without it: as they were.", offered=_BITS
    )
    text: str | None = option(None, "The text that the measurement reads. Without it: a sample.", metavar="FILE")
    force: bool = option(False, "Go on where DST exists already (it is replaced) or there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)
