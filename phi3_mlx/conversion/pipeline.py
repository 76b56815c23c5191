"""`convert`: from a checkpoint to an MLX model directory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import values
from ..engine.machine import room
from ..errors import MemoryLimitError
from ..evaluation.quality import comparison_markdown
from ..option import arguments
from ..sizes import size_text
from ..store.atomic import check_apart, check_destination, new_directory
from ..store.hub import repository_of
from ..threads import refuse_fork
from .checked import CheckedSource
from .choosing import choose
from .fitted_text import FittedText
from .gains import Gain, gain_markdown
from .layout import Layout, Rounder
from .opening import find_source, open_source
from .options import ConvertOptions
from .own_text import own_text_markdown
from .recipes import Recipe
from .rounding import rounded
from .sinks import Progress, staged, write_model
from .sources import Source, weights_of
from .texts import check_can_be_read, tokenizer_of
from .unfinished import asked_digest, claim, left_to_keep, unfinished_for
from .writer import DirectorySink, write_json

if TYPE_CHECKING:
    from .calibrating import MatrixFit
    from .report import Report

RECIPE, OWN_TEXT_ABOUT = "recipe.json", "calibration.json"
_FITTED_TOKENS = 2048  # of the text that weights were fitted to, for the report


@dataclass(frozen=True)
class Conversion:
    """What `convert` has made.

    `recipe` is None for a model in floats; `bytes` counts the weights, `bits_per_weight` their average, scales and
    biases included. `kept` names the matrices that stay in floats because no group of the recipe divides their width.
    `report` is the comparison with the source, if there was one; `notes` are sentences that the caller should see.
    `gain` says what the training of method "distill" gave.
    """

    path: Path
    recipe: Recipe | None
    bytes: int
    bits_per_weight: float
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    report: Report | None = None
    gain: Gain | None = None

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
    method: Literal["round", "gptq", "distill"] | None = None,
    effort: Literal["quick", "good", "best"] | None = None,
    calibration: str | None = None,
    seed: int | None = None,
    text: str | None = None,
    report: bool | None = None,
    force: bool = False,
    allow_nan: bool = False,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    measure: Callable[[str, Path], str] | None = None,
) -> Conversion:
    """Convert a checkpoint to an MLX model directory, by default to 4 bits in groups of 64.

    `source`: a model name, directory or repository (as in `load`), or a GGUF file; packed or not, its projections
    fused or split. `destination` is written beside itself and renamed when complete; `force` replaces a model there.
    At most one tensor is in memory at a time, and a layer where a text is read; what the memory at hand cannot hold is
    refused before anything is read or written, unless `force`.

    A GGUF file's blocks of 4 and 8 bits are kept to the bit unless bits, or a method that reads a text, are asked for.

    `bits` (2, 3, 4, 5, 6, 8), `group_size` (32, 64, 128) and `mode` ("affine", "mxfp4", "mxfp8", "nvfp4") treat all
    layers alike. `target_bpw` (bits per weight, scales included) or `target_size` (bytes, or "2.0GB") chooses bits
    layer by layer instead; `recipe` is such a choice, made before: a JSON file or what it holds. `dequantize` writes
    plain floating weights. Those, scales and biases are in `dtype` ("float32", "bfloat16", "float16"; by default
    what config.json says). `method` "round", as without one, takes the nearest values; "gptq" rounds so that the
    outputs on a text change least; "distill" then trains scales and biases towards the source's next-token
    distributions. These two go on where the same call was cut. They and `target_*` read `calibration` (a bundled text
    by default). "self" lets the source write that text, at temperature 1 from its chat template, before anything is
    packed; `seed` (0 by default) is that of its draws.
    `effort` names a method by what it takes: "quick" ("round"), "good" ("gptq") or "best" ("distill").

    `report` compares result and source on `text` (another bundled one by default) and writes REPORT.md; by default
    where both fit in memory. `allow_nan` converts weights that are not finite. `progress` is called after every layer
    measured, tensor written and part compared. `measure(source, destination)` is called when the model is there; the
    Markdown that it returns, such as what both answer, ends REPORT.md.

    Raises OptionError (contradicting options, a quantization mlx does not have), ModelNotFoundError, CheckpointError
    (files missing or damaged, nowhere to write), ConfigError (a model that phi3 cannot compute),
    MemoryLimitError.
    """
    return convert_as(source, destination, ConvertOptions(**arguments(ConvertOptions, locals())), progress, measure)


def convert_as(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None = None,
    measure: Callable[[str, Path], str] | None = None,
) -> Conversion:
    """`convert`, with all options at once."""
    refuse_fork()
    source = values.path(source, "source", "a model's name, directory or GGUF file")
    destination = Path(values.path(destination, "destination"))
    values.check_function(progress, "progress")
    values.check_function(measure, "measure")
    path = find_source(source, options.revision)
    check_apart(destination, path, "the model")
    check_destination(Path(os.path.realpath(destination)), force=options.force)
    opened = open_source(path)
    opened.name = str(source)
    choice = choose(opened, options)
    checked = CheckedSource(opened, dtype=choice.dtype, allow_nan=options.allow_nan)
    text = FittedText(checked, options.calibration, options.seed) if options.reads_text else None
    layout = Layout.of(checked, choice.recipe, choice.name)
    _check(opened, checked, layout, text, options)
    written = _write(checked, destination, layout, text, options, progress)
    layout, gain = written.layout, written.gain
    made, why_none = _report(destination, opened, layout.nbytes, text, options, progress)
    sections = []
    if text is not None and text.is_own and (made is not None or gain is not None):
        sections.append(own_text_markdown(text.about(options.evaluated)))
    if text is not None and made is not None and written.fits:
        sections.append(_about_fits(destination, opened, written.fits, made, text.ids))
    if gain is not None:
        sections.append(gain_markdown(gain))
    _add_sections(destination, sections)
    if measure is not None:
        asked = values.text(measure(str(source), destination), "what measure returns")
        _add_sections(destination, [asked])
    return Conversion(
        path=Path(os.path.abspath(destination)),
        recipe=layout.recipe,
        bytes=layout.nbytes,
        bits_per_weight=8 * layout.nbytes / weights_of(checked),
        kept=_kept(layout),
        notes=(*choice.notes, *why_none, *_about_report(made), *_about_name(destination)),
        report=made,
        gain=gain,
    )


def _about_report(made: Report | None) -> tuple[str, ...]:
    """What the figures of a report do not show."""
    if made is None:
        return ()
    from .report import FITTED_TO_IT

    return tuple(note for note in made.notes if note == FITTED_TO_IT)


def _about_name(destination: Path) -> tuple[str, ...]:
    """What to say of a directory whose name means another model wherever a model is named."""
    name = str(destination)
    meant = "the bundled model" if name.lower() == "tiny" else repository_of(name)
    return () if meant == name else (f"the name {name} means {meant}; give this directory as ./{name}",)


@dataclass(frozen=True)
class _Written:
    """What became of a layout: another where bits are measured, and what fitting and training gave."""

    layout: Layout
    fits: Sequence[MatrixFit]
    gain: Gain | None


def _check(opened: Source, checked: Source, layout: Layout, text: FittedText | None, options: ConvertOptions) -> None:
    """Refuse what cannot be done before anything is read, or written by the source."""
    from .calibrating import check_grids
    from .distillation import check_is_long_enough
    from .planning import check_conversion, check_own_text, check_training

    if options.text is not None and options.wants_report:
        check_can_be_read(tokenizer_of(checked), options.text)
    rounds, tokens = options.rounding != "round", 0 if text is None else text.tokens
    if rounds and layout.recipe is not None:
        check_grids(layout)
    if options.rounding == "distill":
        check_is_long_enough(tokens)
    if options.force:
        return
    check_conversion(opened, checked, layout, tokens, measures=options.has_target, rounds=rounds)
    if options.writes_text:
        check_own_text(checked)
    if options.rounding == "distill":
        check_training(opened, layout, tokens)


def _write(
    checked: Source,
    destination: Path,
    layout: Layout,
    text: FittedText | None,
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None,
) -> _Written:
    """Write the model."""
    from .planning import kept_on_disk

    # The places come first: measuring takes minutes, and a disk that is full or read-only is known now.
    with (
        unfinished_for(options.rounding, destination) as work,
        new_directory(destination, force=options.force) as folder,
    ):
        sink = DirectorySink(folder, destination)
        nbytes = _target_bytes(checked, options) if options.has_target else layout.nbytes
        kept = kept_on_disk(checked, layout, nbytes, 0 if text is None else text.tokens, options.rounding)
        sink.check_space(nbytes, left_to_keep(work, kept))
        ids: Sequence[int] = ()
        if text is not None:
            if work is not None:
                target = options.target_bpw, options.target_bytes
                claim(
                    work,
                    asked_digest(checked, layout, options.rounding, text.asked, target),
                    options.force,
                    name="asked",
                )
            text.make(work, force=options.force, progress=staged(progress, "writing a text", "tokens"))
            ids = text.ids
        if options.has_target:
            layout = Layout.of(checked, _fitted_recipe(checked, ids, options, progress))
        rounder, fits, gain = _rounder(checked, layout, ids, options, work, progress)
        write_model(sink, checked, layout, rounder, progress)
        if options.has_target or options.recipe is not None:
            write_json(folder / RECIPE, layout.recipe or {})
        if text is not None and text.is_own:
            write_json(folder / OWN_TEXT_ABOUT, text.about(options.evaluated))
    return _Written(layout, fits, gain)


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
        rounds=options.rounding != "round",
        progress=staged(progress, "measuring", "readings of a layer"),
    )


def _rounder(
    checked: Source,
    layout: Layout,
    ids: Sequence[int],
    options: ConvertOptions,
    work: Path | None,
    progress: Callable[[Progress], None] | None,
) -> tuple[Rounder, Sequence[MatrixFit], Gain | None]:
    """The rounder for the method that the options name; what fitting gives, as it is used, and what training gave.

    Fitting and training keep what is done in `work`.
    """
    if layout.recipe is None or work is None:
        return rounded(checked), (), None
    if options.rounding == "gptq":
        from .calibrating import calibrated_in

        calibration = calibrated_in(work, checked, layout, ids, force=options.force)
        return calibration, calibration.fits, None
    from .distillation import distilled

    return distilled(checked, layout, ids, work, force=options.force, progress=progress)


def _about_fits(directory: Path, source: Source, fits: Sequence[MatrixFit], report: Report, ids: Sequence[int]) -> str:
    """What fitting gave, and the KL divergence on the beginning of the text that was read."""
    from ..text.tokenizer import read_tokenizer
    from .fits import fits_markdown
    from .report import make_report

    text = read_tokenizer(directory).decode(list(ids[:_FITTED_TOKENS]))
    seen = make_report(directory, source, text=text, text_name=None, fitted=True, window=report.window, progress=None)
    return fits_markdown(fits, fitted_kl=seen.comparison.kl, other_kl=report.comparison.kl)


def _add_sections(directory: Path, sections: Sequence[str]) -> None:
    """End the report with these."""
    if sections:
        from .report import add_section

        for section in sections:
            add_section(directory, section)


def _report(
    directory: Path,
    source: Source,
    size: int,
    text: FittedText | None,
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None,
) -> tuple[Report | None, tuple[str, ...]]:
    """The report, or None, with a note that says why a report by default could not be made."""
    if not options.wants_report:
        return None, ()
    try:
        return _compared(directory, source, size, text, options, progress), ()
    except Exception as error:  # of any kind, such as MLX's when memory runs out: the model is there all the same
        if options.report:
            raise
        return None, (f"no report: {' '.join(str(error).split()) or type(error).__name__}",)


def _compared(
    directory: Path,
    source: Source,
    size: int,
    text: FittedText | None,
    options: ConvertOptions,
    progress: Callable[[Progress], None] | None,
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
        fitted=text is not None and text.holds(options.evaluated or ""),
        progress=staged(progress, "comparing", "layers"),
    )


def conversion_markdown(made: Conversion) -> str:
    """Size, notes and, if there is a report, what it cost."""
    head = f"**{made.path.name}**: {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.3f} bits per weight"
    parts = [head, *(f"*{note}*" for note in made.notes)]
    if made.report is not None:
        parts.append(f"A: {made.report.source}, B: {made.path.name}, on {made.report.text}")
        parts.append(comparison_markdown(made.report.comparison))
    return "\n\n".join(parts)
