"""`convert`: from a checkpoint to an MLX model directory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import values
from ..config import read_json
from ..engine.machine import room
from ..errors import MemoryLimitError, OptionError, Phi3Error
from ..evaluation.quality import comparison_markdown
from ..places import is_gguf
from ..sizes import parse_size, size_text
from ..store.atomic import check_destination, new_directory
from ..store.checkpoint import DTYPES
from ..store.hub import find_alias, resolve
from ..threads import refuse_fork
from .checked import CheckedSource
from .opening import open_source
from .rounding import Recipe, left_alone, packings, planned, rounded, uniform
from .sources import Source, weights_of
from .writer import Progress, check_space, write_json, write_weights

if TYPE_CHECKING:
    from .report import Report

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Conversion:
    """What `convert` has made.

    `recipe` is None for an unpacked model; `bytes` counts the weights, `bits_per_weight` their average, scales and
    biases included. `kept` names the matrices that stay unpacked because no group of the recipe divides their width.
    `report` is the comparison with the source, if there was one; `notes` are sentences that the caller should see.
    """

    path: Path
    recipe: Recipe | None
    bytes: int
    bits_per_weight: float
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    report: Report | None = None

    def _repr_markdown_(self) -> str:
        return conversion_markdown(self)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    dequantize: bool = False,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    method: Literal["round", "gptq"] = "round",
    calibration: str | None = None,
    text: str | None = None,
    report: bool | None = None,
    force: bool = False,
    allow_nan: bool = False,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a checkpoint to an MLX model directory, by default to 4 bits in groups of 64.

    `source`: a model name, directory or repository (as in `load`), or a GGUF file; packed or not, its projections
    fused or split. `destination` is written beside itself and renamed when complete; `force` replaces a model there.
    At most one tensor is in memory at a time, and a layer where a text is read; what the memory at hand cannot hold is
    refused before anything is read or written, unless `force`.

    A GGUF file's blocks of 4 and 8 bits are kept to the bit unless bits or a method are asked for.

    `bits` (2, 3, 4, 5, 6, 8), `group_size` (32, 64, 128) and `mode` ("affine", "mxfp4", "mxfp8", "nvfp4") treat all
    layers alike. `target_bpw` (bits per weight, scales included) or `target_size` (bytes, or "2.0GB") chooses bits
    layer by layer instead; `recipe` is such a choice, made before: a JSON file or what it holds. `dequantize` writes
    plain floating weights. Those, scales and biases are in `dtype` ("float32", "bfloat16", "float16"; by default
    what config.json says). `method` "gptq" rounds so that the outputs on a text change least; it and `target_*` read
    `calibration` (a bundled text by default).

    `report` compares result and source on `text` (another bundled one by default) and writes REPORT.md; by default
    where both fit in memory. `allow_nan` converts weights that are not finite. `progress` is called after every layer
    measured, tensor written and part compared.

    Raises OptionError (contradicting options, a quantization mlx does not have), ModelNotFoundError, CheckpointError
    (files missing or damaged, nowhere to write), ConfigError (a model that phi3 cannot compute),
    MemoryLimitError.
    """
    refuse_fork()
    source = values.path(source, "source", "a model's name, directory or GGUF file")
    destination = Path(values.path(destination, "destination"))
    bits, group_size = (
        values.optional(values.whole, value, name) for name, value in (("bits", bits), ("group_size", group_size))
    )
    target_bpw = values.optional(values.number, target_bpw, "target_bpw")
    dequantize, force = values.flag(dequantize, "dequantize"), values.flag(force, "force")
    allow_nan, report = values.flag(allow_nan, "allow_nan"), values.optional(values.flag, report, "report")
    calibration = values.optional(values.text, calibration, "calibration")
    text = values.optional(values.text, text, "text")
    values.check_function(progress, "progress")
    if recipe is not None and not isinstance(recipe, Mapping):
        recipe = values.path(recipe, "recipe", "a JSON file, or what it holds")
    _check_options(bits, group_size, mode, dtype, dequantize, target_bpw, target_size, recipe, method)
    if text is not None and (report is False or (dequantize and not report)):
        asks = "; report=True asks for one" if report is None else ""
        raise OptionError(f"text has no effect where no report is made{asks}; leave it out")
    wanted = uniform(bits, group_size, mode)  # refuses what mlx does not have
    path = _resolve(source, revision)
    _check_places(path, destination, force)
    opened = open_source(path)
    opened.name = str(source)
    wanted |= left_alone(opened.config)
    asked = any((bits, group_size, target_bpw, target_size, recipe)) or mode != "affine"
    notes = _about_packed(opened, dequantize, asked)
    keeps = bool(opened.blocks) and not (asked or dequantize or method == "gptq")
    if keeps:
        wanted = _recipe_of_blocks(opened)
        but = "" if dtype in (None, "float16", "float32") else f", but for their scales, rounded to {dtype}"
        notes.append(f"the blocks of {opened.name} are kept as they are{but}; bits=N rounds them a second time")
        others = [
            path for path, own in wanted.items() if isinstance(own, dict) and f"{path}.weight" not in opened.blocks
        ]
        if others:
            notes.append(
                f"{len(others)} matrices of other types are rounded to 8 bits ({others[0]}, ...); "
                "not with dequantize=True"
            )
    # float16 holds the scales of GGUF's blocks exactly.
    dtype = dtype or ("float16" if keeps else _own_dtype(opened.config))
    read = CheckedSource(opened, dtype=dtype, allow_nan=allow_nan)
    fitted = method == "gptq" or target_bpw is not None or target_size is not None
    if calibration is not None and not fitted:
        raise OptionError(
            "calibration has no effect without method='gptq', target_bpw=X or target_size=SIZE; leave it out"
        )
    ids = _calibration_ids(read, calibration) if fitted else []
    chosen: Recipe | None = None if dequantize else wanted
    where = opened.name
    if recipe is not None:
        chosen, where = _given_recipe(recipe)
    weights = weights_of(read)
    target_bytes = None if target_size is None else parse_size(target_size)
    if not force:
        from .planning import check_room

        written = planned(read.tensors, packings(chosen, read.tensors, where))
        check_room(opened, read, written, ids, measures=target_bpw is not None or target_bytes is not None)
    # The place comes first: measuring takes minutes, and a disk that is full or read-only is known now.
    disk = Path(os.path.realpath(destination)).parent
    with new_directory(destination, force=force) as folder:
        read.write_extras(folder)  # first, for it may refuse
        if target_bpw is not None or target_bytes is not None:
            from .sensitivity import choose_recipe

            asked_for = target_bytes or (target_bpw or 0) * weights / 8
            check_space(disk, int(asked_for) if math.isfinite(asked_for) else 0)
            chosen = choose_recipe(
                read,
                target_bpw=target_bpw,
                target_bytes=target_bytes,
                group_size=wanted["group_size"],
                ids=ids,
                progress=_staged(progress, "measuring", "readings of a layer"),
            )
        packed = packings(chosen, read.tensors, where)
        if chosen is not None and not packed:
            raise OptionError(
                f"{where}: groups of {chosen['group_size']} divide no layer's width; choose a smaller group"
            )
        tensors = planned(read.tensors, packed)
        total = sum(tensor.nbytes for tensor in tensors.values())
        check_space(disk, total)
        if chosen is not None and method == "gptq":
            from .gptq import calibrated

            arrays = calibrated(read, chosen, ids)
        else:
            arrays = rounded(read, chosen)
        write_weights(folder, tensors, arrays, progress)
        config = dict(read.config)
        if chosen is not None:
            # Twice because tools of the Hugging Face hub look for the second name.
            config |= {"quantization": chosen, "quantization_config": chosen}
            if chosen is not wanted:
                write_json(folder / RECIPE, chosen)
        write_json(folder / "config.json", config)
    made = None
    if report or (report is None and chosen is not None):
        try:
            made = _report(destination, opened, total, text, text == calibration, report is None, progress)
        except (Phi3Error, OSError) as error:  # the model is there, whatever becomes of its report
            if report:
                raise
            notes.append(f"no report: {error}")
    matrices = [name for name, tensor in read.tensors.items() if len(tensor.shape) > 1]
    excluded = {name for name in matrices if (chosen or {}).get(name.removesuffix(".weight")) is False}
    return Conversion(
        path=Path(os.path.abspath(destination)),
        recipe=chosen,
        bytes=total,
        bits_per_weight=8 * total / weights,
        kept=tuple(name for name in matrices if chosen and name not in packed and name not in excluded),
        notes=tuple(notes),
        report=made,
    )


def _report(
    directory: Path,
    source: Source,
    size: int,
    text: str | None,
    fitted: bool,
    only_if_it_fits: bool,
    progress: Callable[[Progress], None] | None,
) -> Report:
    from .report import memory_needed, write_report

    needed, available = memory_needed(source, size), room()
    if only_if_it_fits and needed > available:
        raise MemoryLimitError(
            f"it takes about {size_text(needed)} of memory, and {size_text(available)} are free; report=True makes "
            "it nonetheless"
        )
    return write_report(
        directory,
        source,
        text=text,
        fitted=fitted and text is not None,
        progress=_staged(progress, "comparing", "layers"),
    )


def _check_options(
    bits: int | None,
    group_size: int | None,
    mode: str,
    dtype: str | None,
    dequantize: bool,
    target_bpw: float | None,
    target_size: int | str | None,
    recipe: object,
    method: str,
) -> None:
    """OptionError for options that contradict each other; the first of them is named."""
    if dtype is not None:
        values.choice(dtype, "dtype", DTYPES)
    values.choice(method, "method", ("round", "gptq"))
    given = {
        "bits": bits,
        "group_size": group_size,
        "mode": None if values.text(mode, "mode") == "affine" else mode,
        "target_bpw": target_bpw,
        "target_size": target_size,
        "recipe": "FILE" if isinstance(recipe, Mapping) else recipe,
        "method": None if method == "round" else method,
    }
    if target_size is not None:
        parse_size(target_size)
    named = {name: f"{name}={value}" for name, value in given.items() if value is not None}
    if dequantize and named:
        raise OptionError(
            f"dequantize=True writes plain weights, so it has no use for {next(iter(named.values()))}; leave one out"
        )
    plans = [name for name in named if name in ("target_bpw", "target_size", "recipe")]
    if len(plans) > 1:
        raise OptionError(f"{named[plans[0]]} and {named[plans[1]]} each decide the bits of every layer; leave one out")
    decided = ("bits", "group_size", "mode") if recipe is not None else ("bits", "mode")
    clash = next((name for name in decided if plans and name in named), None)
    if clash:
        raise OptionError(f"{named[plans[0]]} decides what {named[clash]} would; leave one out")


def _resolve(source: str | Path, revision: str | None) -> Path:
    path = Path(os.path.expanduser(source))
    named = path.suffix.lower() == ".gguf" and (path.is_file() or not path.exists())
    if named or (find_alias(str(source)) is None and is_gguf(path)):
        if revision is not None:
            raise OptionError(f"a revision is for Hugging Face repositories, and {source} is a file; leave it out")
        return path
    return resolve(str(source), revision)


def _check_places(source: Path, destination: Path, force: bool) -> None:
    real, target = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if target == real or target in real.parents:
        raise OptionError(f"{destination} is, or holds, the model that is read; name another directory")
    check_destination(target, force=force)


def _recipe_of_blocks(source: Source) -> Recipe:
    """The recipe that keeps what a source stores in blocks; matrices of other packed types get 8 bits."""
    stored = {name: blocks.packing for name, blocks in source.blocks.items()}
    widths = [packing["bits"] for packing in stored.values()]
    every = {"group_size": 32, "bits": max(set(widths), key=widths.count), "mode": "affine"}
    recipe: Recipe = dict(every)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2 and stored.get(name) != every:
            # A source spells packed tensors that mlx has no blocks for as float32.
            other = every | {"bits": 8} if tensor.dtype == "F32" else False
            recipe[name.removesuffix(".weight")] = stored.get(name, other)
    return recipe


def _about_packed(source: Source, dequantize: bool, asked: bool) -> list[str]:
    """What to say about a source that is packed already; OptionError where nothing says what to make of it."""
    if source.quantization is None or dequantize:
        return []
    now = f"{source.quantization.get('bits', '?')}-bit"
    if not asked:
        raise OptionError(
            f"{source.name} is {now} already; dequantize=True unpacks it, bits=N unpacks it and rounds a second time"
        )
    return [
        f"{source.name} is {now} already: it was unpacked and rounded a second time, which costs quality; "
        "convert the original if you can"
    ]


def _own_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json names, if it is one that weights can be kept in."""
    name = config.get("torch_dtype") or config.get("dtype")
    return name if name in DTYPES else None


def _given_recipe(recipe: str | Path | Mapping[str, Any]) -> tuple[Recipe, str]:
    """A recipe and what messages call it. A config.json may stand for the recipe it holds."""
    if isinstance(recipe, Mapping):
        return dict(recipe), "the recipe"
    path = Path(os.path.expanduser(recipe))
    found = read_json(path)
    return found.get("quantization") or found, str(path)


def _calibration_ids(source: Source, text: str | None) -> list[int]:
    """What bits and weights are fitted to: a text, or a bundled one that reports do not read."""
    from ..text.tokenizer import load_tokenizer
    from .texts import bundled

    with tempfile.TemporaryDirectory() as folder:
        source.write_extras(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    return tokenizer.encode(bundled("calibration") if text is None else text)


def _staged(progress: Callable[[Progress], None] | None, stage: str, unit: str) -> Callable[[int, int], None] | None:
    """`progress` as those want it who count to a total."""
    if progress is None:
        return None
    return lambda done, total: progress(Progress(stage, unit, done, total))


def conversion_markdown(made: Conversion) -> str:
    """Size, notes and, if there is a report, what it cost."""
    head = f"**{made.path.name}**: {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.3f} bits per weight"
    parts = [head, *(f"*{note}*" for note in made.notes)]
    if made.report is not None:
        parts.append(f"A: {made.report.source}, B: {made.path.name}, on {made.report.text}")
        parts.append(comparison_markdown(made.report.comparison))
    return "\n\n".join(parts)
