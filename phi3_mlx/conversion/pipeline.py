"""`convert`: from a checkpoint to an MLX model directory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import values
from ..engine.machine import room
from ..errors import MemoryLimitError, OptionError, Phi3Error
from ..evaluation.quality import comparison_markdown
from ..option import arguments
from ..places import is_gguf
from ..sizes import size_text
from ..store.atomic import check_destination, new_directory
from ..store.hub import find_alias, repository_of, resolve
from ..threads import refuse_fork
from .checked import CheckedSource
from .choosing import choose
from .layout import Layout, Rounder
from .opening import open_source
from .options import ConvertOptions
from .recipes import Recipe
from .rounding import rounded
from .sinks import Progress, write_model
from .sources import Source, weights_of
from .writer import DirectorySink, write_json

if TYPE_CHECKING:
    from .report import Report

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Conversion:
    """What `convert` has made.

    `recipe` is None for a model in floats; `bytes` counts the weights, `bits_per_weight` their average, scales and
    biases included. `kept` names the matrices that stay in floats because no group of the recipe divides their width.
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
    mode: str = ConvertOptions.mode,
    dtype: str | None = None,
    dequantize: bool = False,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    method: Literal["round", "gptq"] = ConvertOptions.method,
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
    return convert_as(source, destination, ConvertOptions(**arguments(ConvertOptions, locals())), progress)


def convert_as(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """`convert`, with all options at once."""
    refuse_fork()
    source = values.path(source, "source", "a model's name, directory or GGUF file")
    destination = Path(values.path(destination, "destination"))
    values.check_function(progress, "progress")
    path = _resolve(source, options.revision)
    _check_places(path, destination, options.force)
    opened = open_source(path)
    opened.name = str(source)
    choice = choose(opened, options)
    checked = CheckedSource(opened, dtype=choice.dtype, allow_nan=options.allow_nan)
    ids = _calibration_ids(checked, options.calibration) if options.reads_text else []
    layout = Layout.of(checked, choice.recipe, choice.name)
    if not options.force:
        from .planning import check_conversion

        check_conversion(opened, checked, layout, ids, measures=options.has_target)
    layout = _write(checked, destination, layout, ids, options, progress)
    made, why_none = _report(destination, opened, layout.nbytes, options, progress)
    return Conversion(
        path=Path(os.path.abspath(destination)),
        recipe=layout.recipe,
        bytes=layout.nbytes,
        bits_per_weight=8 * layout.nbytes / weights_of(checked),
        kept=_kept(layout),
        notes=(*choice.notes, *why_none, *_about_name(destination)),
        report=made,
    )


def _about_name(destination: Path) -> tuple[str, ...]:
    """What to say of a directory whose name means another model wherever a model is named."""
    name = str(destination)
    meant = "the bundled model" if name.lower() == "tiny" else repository_of(name)
    return () if meant == name else (f"the name {name} means {meant}; give this directory as ./{name}",)


def _write(
    checked: Source,
    destination: Path,
    layout: Layout,
    ids: Sequence[int],
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None,
) -> Layout:
    """Write the model; returns its layout, which is another where bits are chosen by a measurement."""
    # The place comes first: measuring takes minutes, and a disk that is full or read-only is known now.
    with new_directory(destination, force=options.force) as folder:
        sink = DirectorySink(folder, destination)
        if options.has_target:
            sink.check_space(_target_bytes(checked, options))
            layout = Layout.of(checked, _fitted_recipe(checked, ids, options, progress))
        write_model(sink, checked, layout, _rounder(checked, layout, ids, options), progress)
        if options.has_target or options.recipe is not None:
            write_json(folder / RECIPE, layout.recipe or {})
    return layout


def _kept(layout: Layout) -> tuple[str, ...]:
    """The matrices that are not packed though the recipe does not exclude them: its groups do not divide them."""
    recipe = layout.recipe
    if recipe is None:
        return ()
    matrices = [entry for entry in layout.entries if len(entry.tensor.shape) > 1 and entry.packing is None]
    return tuple(entry.name for entry in matrices if recipe.get(entry.path) is not False)


def _target_bytes(checked: Source, options: ConvertOptions) -> int:
    """The size that the options ask for, in bytes; 0 for one that `choose_recipe` refuses."""
    nbytes = options.target_bytes or (options.target_bpw or 0) * weights_of(checked) / 8
    return int(nbytes) if math.isfinite(nbytes) else 0


def _fitted_recipe(
    checked: Source, ids: Sequence[int], options: ConvertOptions, progress: Callable[[Progress], None] | None
) -> Recipe:
    """The bits of every layer for the target that the options name."""
    from .sensitivity import choose_recipe

    return choose_recipe(
        checked,
        target_bpw=options.target_bpw,
        target_bytes=options.target_bytes,
        group_size=options.uniform["group_size"],
        ids=ids,
        progress=_staged(progress, "measuring", "readings of a layer"),
    )


def _rounder(checked: Source, layout: Layout, ids: Sequence[int], options: ConvertOptions) -> Rounder:
    """The rounder for the method that the options name."""
    if layout.recipe is None or options.method == "round":
        return rounded(checked)
    from .gptq import calibrated

    return calibrated(checked, layout, ids)


def _report(
    directory: Path, source: Source, size: int, options: ConvertOptions, progress: Callable[[Progress], None] | None
) -> tuple[Report | None, tuple[str, ...]]:
    """The report, or None, with a note that says why a report by default could not be made."""
    if not options.wants_report:
        return None, ()
    try:
        return _compared(directory, source, size, options, progress), ()
    except (Phi3Error, OSError) as error:  # the model is there, whatever becomes of its report
        if options.report:
            raise
        return None, (f"no report: {error}",)


def _compared(
    directory: Path, source: Source, size: int, options: ConvertOptions, progress: Callable[[Progress], None] | None
) -> Report:
    from .report import memory_needed, write_report

    needed, available = memory_needed(source, size), room()
    if options.report is None and needed > available:
        raise MemoryLimitError(
            f"it takes about {size_text(needed)} of memory, and {size_text(available)} are free; report=True makes "
            "it anyway"
        )
    return write_report(
        directory,
        source,
        text=options.text,
        fitted=options.text is not None and options.text == options.calibration,
        progress=_staged(progress, "comparing", "layers"),
    )


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


def _calibration_ids(source: Source, text: str | None) -> list[int]:
    """What bits and weights are fitted to: a text, or a bundled one that reports do not read."""
    from ..text.tokenizer import read_tokenizer
    from .texts import bundled

    with tempfile.TemporaryDirectory() as folder:
        source.write_extras(Path(folder))
        tokenizer = read_tokenizer(Path(folder))
    return tokenizer.encode(bundled("calibration") if text is None else text)


def _staged(progress: Callable[[Progress], None] | None, stage: str, unit: str) -> Callable[[int, int], None] | None:
    """A callback for (done, total) that reports them to `progress` as this stage."""
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
