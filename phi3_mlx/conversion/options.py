"""What `convert` and `fuse` can be told. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import values
from ..errors import OptionError
from ..option import DTYPE_NAMES, Range, option, settle
from ..sizes import parse_size

if TYPE_CHECKING:
    from .recipes import Recipe

_METHODS = ("round", "gptq", "distill")
_EFFORTS = {"quick": "round", "good": "gptq", "best": "distill"}
_BITS = (2, 3, 4, 5, 6, 8)
OWN_TEXT = "self"  # in the place of a calibration text
_SEED = Range(lambda s: s >= 0, "0 or more")
_read_dtype = partial(values.choice, choices=DTYPE_NAMES)


def _recipe(value: Any, name: str) -> Any:
    return value if isinstance(value, Mapping) else values.path(value, name, "a JSON file, or what it holds")


def _size(value: Any, name: str) -> int | str:
    parse_size(value)  # refuses what is no size
    return value  # as messages repeat it


def _folder(value: Any, name: str) -> str | Path:
    return values.path(value, name, "the folder of an adapter")


def _compared_text(value: Any, name: str) -> str:
    """A text with something to predict: hours later it would be too late to say that there is none."""
    if not values.text(value, name).strip():
        raise OptionError(f"{name} is empty; give some")
    return value


def _check_seed(seed: int | None, calibration: str | None) -> None:
    if seed is not None and calibration != OWN_TEXT:
        raise OptionError(f"seed has no effect without calibration='{OWN_TEXT}'; leave it out")


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
    method: Literal["round", "gptq", "distill"] | None = option(
        None,
        "gptq: round so that the layers' outputs on a text change least; slower, better. distill: then train scales "
        "and biases towards SRC's outputs. Without it: round, to the nearest values.",
        choices=_METHODS,
        read=partial(values.choice, choices=_METHODS),
    )
    effort: Literal["quick", "good", "best"] | None = option(
        None,
        "The method by what it takes: quick is round, good is gptq, best is distill.",
        choices=tuple(_EFFORTS),
        read=partial(values.choice, choices=tuple(_EFFORTS)),
    )
    calibration: str | None = option(
        None,
        "The text that gptq, distill and --target-… read; self: SRC writes it. Without it: a sample.",
        metavar="FILE|self",
    )
    seed: int | None = option(None, "Of the text that SRC writes. Without it: 0.", _SEED)
    text: str | None = option(
        None, "The text that the report reads. Without it: another sample.", metavar="FILE", read=_compared_text
    )
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
        if self.effort is not None and self.method not in (None, self.rounding):
            raise OptionError(
                f"effort={self.effort} is method={self.rounding}, not method={self.method}; leave one out"
            )
        self._check_one_decides()
        if self.text is not None and not self.wants_report:
            asks = "; report=True asks for one" if self.report is None else ""
            raise OptionError(f"text has no effect where no report is made{asks}; leave it out")
        _ = self.uniform  # refuses what mlx does not have
        if self.calibration is not None and not self.reads_text:
            raise OptionError(
                "calibration has no effect without method=gptq, method=distill, target_bpw=X or target_size=SIZE; "
                "leave it out"
            )
        _check_seed(self.seed, self.calibration)

    @cached_property
    def uniform(self) -> Recipe:
        """The recipe that `bits`, `group_size` and `mode` ask for, or that of their defaults."""
        from .recipes import uniform

        return uniform(self.bits, self.group_size, self.mode)

    @property
    def rounding(self) -> str:
        """The method, by whichever name it was given."""
        return self.method or "round" if self.effort is None else _EFFORTS[self.effort]

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
        return self.rounding != "round" or self.has_target

    @property
    def evaluated(self) -> str | None:
        """The text that the report reads, if one is made."""
        from .texts import bundled

        return (bundled("sample") if self.text is None else self.text) if self.wants_report else None

    @property
    def writes_text(self) -> bool:
        """Whether the source writes that text itself."""
        return self.calibration == OWN_TEXT

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
            "method": self.method,
            "effort": self.effort,
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
    method: Literal["round", "gptq", "distill"] = option(
        "round",
        "gptq: pack the changed layers so that outputs on a text change least; slower, keeps more of the adapter. "
        "distill: then train scales and biases of all layers.",
        choices=_METHODS,
        read=partial(values.choice, choices=_METHODS),
    )
    calibration: str | None = option(
        None,
        "The text that gptq and distill read; self: the model with the adapter writes it. Without it: a sample.",
        metavar="FILE|self",
    )
    seed: int | None = option(None, "Of the text that the model writes. Without it: 0.", _SEED)
    text: str | None = option(
        None, "The text that the measurement reads. Without it: a sample.", metavar="FILE", read=_compared_text
    )
    force: bool = option(False, "Go on where DST exists already (it is replaced) or there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)
        if self.calibration is not None and self.method == "round":
            raise OptionError("calibration has no effect without method=gptq or method=distill; leave it out")
        _check_seed(self.seed, self.calibration)


GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1",
              "q4_0", "q3_k_m", "q2_k")  # fmt: skip
_REGIMES = ("short", "long")


@dataclass(frozen=True)
class ExportOptions:
    """What `export_gguf` can be told, which explains it. Raises OptionError for a value of the wrong type."""

    adapter: str | Path | None = option(
        None, "Merge the adapter in this folder on the way.", read=_folder, metavar="DIR"
    )
    type: str | None = option(
        None,
        f"Type of the weights: {', '.join(GGUF_TYPES)}. Without it: one that holds the model's own.",
        choices=GGUF_TYPES,
        metavar="TYPE",
    )
    name: str | None = option(
        None, "general.name, by which llama.cpp strips white space. Without it: one that strips right.", metavar="NAME"
    )
    longrope: Literal["short", "long"] = option(
        "short",
        "LongRoPE's factors that the file is meant for: of contexts up to the original length, or beyond it.",
        choices=_REGIMES,
        read=partial(values.choice, choices=_REGIMES),
    )
    modelfile: bool = option(False, "Write ollama's Modelfile beside it.")
    importance: bool = option(
        True,
        "For K types: let errors count by what a text sends through the weights.",
        flags="--importance/--no-importance",
    )
    calibration: str | None = option(None, "That text. Without it: a sample.", metavar="FILE")
    report: bool | None = option(
        None,
        "Compare with the model on a text: KL divergence; done without asking where weights are rounded a second time.",
        flags="--report/--no-report",
    )
    text: str | None = option(
        None, "Compare on this text. Without it: another sample.", metavar="FILE", read=_compared_text
    )
    split_max_size: int | str | None = option(
        None, "Write several files of at most this size: 4GB.", read=_size, metavar="SIZE"
    )
    revision: str | None = option(None, "A branch, tag or commit of the repository.", metavar="REV")
    force: bool = option(False, "Go on where the file exists already (it is replaced) or there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)
        if not self.importance and not self._is_k_type:
            raise OptionError("importance=False has no effect without a K type, such as type='q4_k_m'; leave it out")
        if self.calibration is not None and not self.reads_calibration:
            raise OptionError(
                "calibration has no effect without a K type, such as type='q4_k_m', and importance; leave it out"
            )
        if self.text is not None and self.report is False:
            raise OptionError("text has no effect where no report is made; leave it out")
        if self.modelfile and self.split_max_size is not None:
            size = f"split_max_size={self.split_max_size}"
            raise OptionError(f"modelfile=True is for ollama, which takes no parts; leave out {size}")

    @property
    def is_to_report(self) -> bool | None:
        """Whether the file is compared with the model; None: nobody said. A text to compare on says yes."""
        return True if self.text is not None else self.report

    @property
    def reads_calibration(self) -> bool:
        """Whether a text says how much errors count."""
        return self.importance and self._is_k_type

    @property
    def _is_k_type(self) -> bool:
        return self.type is not None and "_k" in self.type

    @property
    def split_bytes(self) -> int | None:
        return None if self.split_max_size is None else parse_size(self.split_max_size)
