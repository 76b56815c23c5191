"""KL divergence against bits per weight, with the time and memory of each method, and mlx-lm's methods beside them.

    python -m bench quantization MODEL [--method NAME ...] [--bits LIST] [--formats] [--beside] [--ablation]
                                       [--text FILE] [--calibration FILE|self] [--tokens N] [--questions DIR]

MODEL is a name, a directory or a GGUF file. What measures or fits reads the calibration text, the figures come from the
other one; by default both are texts that come with the package. Methods: `uniform`, `gptq` and `distill` give all
layers the same bits; `mixed` gives each its own, by sensitivity, and `mixed + gptq` does at the sizes of uniform bits,
by sensitivity to GPTQ's errors. `distill` begins with `gptq`, which is then measured on the way; with `mixed` there is
`mixed + distill`, too. Seconds are those of the clock and of the processor; the peak is of MLX's memory. With
`--questions` each model answers MMLU, ARC and BLiMP, and what flips is counted (`answers.py`). The result is
`quantization-NAME`, kept after every row, and with `mixed` drawn in results/quantization-NAME.png.

The published curve of the bundled model is of weights/tiny-8bit and of stories that weights/training/data.py splits
off; that of SmolLM2-135M-Instruct is of its Q4_1 GGUF file, converted with --dequantize --dtype float32.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from click.core import ParameterSource

from phi3_mlx import compare, resolve
from phi3_mlx.conversion.calibrating import GPTQ_WINDOW, GptqSteps, calibrated
from phi3_mlx.conversion.checked import CheckedSource
from phi3_mlx.conversion.distillation import distilled
from phi3_mlx.conversion.fitted_text import FittedText
from phi3_mlx.conversion.layout import Layout, Rounder
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.recipes import Recipe, uniform
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.sensitivity import BITS, allocate, as_recipe, measure, sizes_of
from phi3_mlx.conversion.sinks import Progress
from phi3_mlx.conversion.sources import Source, to_mlx, weights_of
from phi3_mlx.conversion.texts import bundled, windows
from phi3_mlx.conversion.unfinished import PACKED
from phi3_mlx.conversion.writer import DirectorySink, write_json
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.safetensors import find_weights
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

from . import plots, record, theirs
from .answers import answers, flips

_MIXED = (2.75, 3.0, 3.25, 3.75, 4.0, 4.25, 4.75, 5.0, 5.25, 6.0, 7.0, 8.0)  # beside uniform's own sizes
_METHODS = ("uniform", "gptq", "distill", "mixed")
_GROUPS = (32, 64, 128)
_FLOATING = ("mxfp4", "nvfp4", "mxfp8")  # with bits and groups of their own
_ABLATION = {
    "targets": GptqSteps(targets=False),
    "stream": GptqSteps(stream=False),
    "damping": GptqSteps(damping=False),
    "refit": GptqSteps(sweeps=0),
    "all of them": GptqSteps(targets=False, damping=False, sweeps=0),
}


class Meter:
    """Seconds of the clock and the processor since it was made, and the peak of MLX's memory since then.

    `held`: the bytes that were there before and do not count.
    """

    def __init__(self, held: int | None = None):
        gc.collect()
        mx.clear_cache()
        self.held = mx.get_active_memory() if held is None else held
        mx.reset_peak_memory()
        self._start, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._start,
            "cpu_seconds": time.process_time() - self._processor,
            "peak_memory": mx.get_peak_memory() - self.held,
        }


def write(directory: Path, source: Source, layout: Layout, arrays: Rounder) -> None:
    """A model directory without a tokenizer."""
    directory.mkdir()
    sink = DirectorySink(directory)
    sink.write(layout, arrays)
    sink.write_config(source.raw_config, layout)


class Points:
    """Rows of a result, each a model that a method made of `source`, kept as soon as it is measured.

    `folder` holds the models; `keep` gets all rows so far. `questions`, a folder, are asked of each.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        text: str,
        ids: list[int],
        folder: Path,
        keep: Callable[[list[dict[str, Any]]], None],
        questions: Path | None = None,
    ):
        self.source, self.ids, self.folder = source, ids, folder
        self._tokenizer, self._text, self._keep, self._questions = tokenizer, text, keep, questions
        self._weights = weights_of(source)
        self.rows: list[dict[str, Any]] = []
        full = CheckedSource(source, dtype="float32")
        self.reference = folder / "reference"
        write(self.reference, full, Layout.of(full, None), rounded(full))
        if questions:
            self._before = answers(read_model(self.reference), tokenizer, questions)

    def make(self, method: str, recipe: Recipe, gptq: GptqSteps | None = None) -> None:
        """The point of plain rounding, or of GPTQ."""
        layout, target, meter = Layout.of(self.source, recipe), self._next(), Meter()
        arrays = calibrated(self.source, layout, self.ids, steps=gptq) if gptq else rounded(self.source)
        write(target, self.source, layout, arrays)
        del arrays
        self._add(method, target, meter.read())

    def distill(self, recipe: Recipe, kind: str = "") -> None:
        """The points of GPTQ and of the distillation that begins with what it made; `kind` begins their names."""
        layout, work, target = Layout.of(self.source, recipe), self._next("work"), self._next("made")
        work.mkdir()
        meters = [Meter()]
        packing: dict[str, float] = {}
        costs: dict[str, float] = {}

        def notice(now: Progress) -> None:
            if now.stage == "packing" and now.done == now.total:
                packing.update(meters[0].read())  # before the source's distributions, which only distilling needs
            if now.stage == "distilling" and not costs:
                costs.update(meters[0].read())
                DirectorySink(work / PACKED).write_config(self.source.raw_config, layout)
                self._add(f"{kind}gptq", work / PACKED, packing)
                meters.append(Meter(meters[0].held))

        arrays, _, gain = distilled(self.source, layout, self.ids, work, progress=notice)
        write(target, self.source, layout, arrays)
        del arrays
        more = meters[1].read()
        for name in ("seconds", "cpu_seconds"):
            costs[name] += more[name]
        costs["peak_memory"] = max(costs["peak_memory"], more["peak_memory"])
        self._add(f"{kind}distill", target, costs, held_out={"before": gain.held_before, "after": gain.held_after})

    def beside(self, method: str, width: int, group_size: int, size: float) -> None:
        """The point of one of mlx-lm's methods, or a row that says why there is none."""
        target, meter = self._next(), Meter()
        dtype = to_mlx(next(iter(self.source.tensors.values())).dtype)
        rows = windows(self.ids, GPTQ_WINDOW)
        try:
            theirs.make(method, theirs.Task(self.reference, rows, width, group_size, size, dtype), target)
        except NotImplementedError as error:
            click.echo(f"mlx-lm {method}: {error}")
            self._append({"method": f"mlx-lm {method}", "bits_per_weight": size, "refused": str(error)})
            return
        self._add(f"mlx-lm {method}", target, meter.read())

    def _next(self, kind: str = "model") -> Path:
        return self.folder / f"{kind}-{len(self.rows)}"

    def _add(self, method: str, directory: Path, costs: dict[str, float], **facts: Any) -> None:
        size = 8 * sum(tensor.nbytes for tensor in find_weights(directory).tensors.values()) / self._weights
        reference, model = read_model(self.reference), read_model(directory)
        found = compare(reference, self._tokenizer, model, self._tokenizer, self._text)
        assert found.kl is not None
        click.echo(
            f"{method:16} {size:6.3f} bits per weight  KL {found.kl:.5f}  perplexity {found.b.perplexity:.3f}  "
            f"{costs['cpu_seconds']:.0f} s of the processor  peak {costs['peak_memory'] / 1e6:,.0f} MB"
        )
        figures = {"kl": found.kl, "top1": found.top1, "perplexity": found.b.perplexity}
        if self._questions:
            facts["answers"] = flips(self._before, answers(model, self._tokenizer, self._questions))
        row = {"method": method, "bits_per_weight": size, **figures, **costs, **facts}
        self._append({**row, "original_perplexity": found.a.perplexity})

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._keep(self.rows)


def alike(points: Points, widths: list[int], fitted: list[int], group_size: int, methods: tuple[str, ...]) -> None:
    """The points of methods that give all layers the same bits, of `fitted` widths those that read a text, too."""
    for width in widths:
        recipe = uniform(width, group_size)
        if "uniform" in methods:
            points.make("uniform", recipe)
        if width in fitted and "distill" in methods:
            points.distill(recipe)
        elif width in fitted and "gptq" in methods:
            points.make("gptq", recipe, GptqSteps())


def formats(points: Points, widths: list[int], fitted: list[int], group_size: int) -> None:
    """The points of other groups, of `fitted` widths by GPTQ, too, and of MLX's floating formats.

    Groups that do not divide all matrices of the others' are left out: what they leave in floats hides what they do.
    """
    source = points.source
    inputs = {source.tensors[name].shape[-1] for name in Layout.of(source, uniform(4, group_size)).packings}
    for size in (size for size in _GROUPS if size != group_size):
        if any(count % size for count in inputs):
            click.echo(f"groups of {size} do not divide all matrices")
            continue
        for width in widths:
            points.make(f"uniform, groups of {size}", uniform(width, size))
            if width in fitted:
                points.make(f"gptq, groups of {size}", uniform(width, size), GptqSteps())
    for mode in _FLOATING:
        points.make(mode, uniform(mode=mode))


def mixed(points: Points, widths: list[int], fitted: list[int], group_size: int, *, distill: bool = False) -> float:
    """The points of bits by sensitivity, at uniform's sizes and between them; returns the seconds of measuring it."""
    source, start = points.source, time.perf_counter()
    costs = measure(source, points.ids, group_size=group_size)
    by_gptq = measure(source, points.ids, group_size=group_size, rounds=True) if fitted else costs
    seconds = time.perf_counter() - start
    sizes, fixed = sizes_of(source, group_size, BITS)
    uniforms = {width: fixed + sum(by_width[width] for by_width in sizes.values()) for width in widths}
    ends = min(uniforms.values()), max(uniforms.values())
    between = {int(bits * weights_of(source) / 8) for bits in _MIXED} | {*uniforms.values()}
    for size in sorted(size for size in between if ends[0] <= size <= ends[1]):
        recipe = as_recipe(allocate(costs, sizes, size - fixed), sizes, group_size)
        points.make("mixed", recipe)
        if size in [uniforms[width] for width in fitted]:
            recipe = as_recipe(allocate(by_gptq, sizes, size - fixed), sizes, group_size)
            if distill:
                points.distill(recipe, "mixed + ")
            else:
                points.make("mixed + gptq", recipe, GptqSteps())
    return seconds


@click.command(help=__doc__)
@click.argument("model")
@click.option("--text", type=click.File(encoding="utf-8"), help="What the figures are measured on.")
@click.option("--calibration", metavar="FILE|self", help="What is measured and fitted on; self: MODEL writes it.")
@click.option("--group-size", type=int, default=64, show_default=True)
@click.option("--bits", default="2,3,4,5,6,8", show_default=True, help="Uniform widths.")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Of the text, at most.")
@click.option("--calibration-tokens", type=int, default=16384, show_default=True, help="Of the other, at most.")
@click.option("--name", help="Of the result files; MODEL's last part without it.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of scales; MODEL's without it.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(_METHODS), default=("uniform", "gptq", "mixed"),
    show_default=True,
)  # fmt: skip
@click.option("--gptq-bits", default="2,3,4,5,6,8", show_default=True, help='Of them those also fitted; "": none.')
@click.option("--formats", "others", is_flag=True, help="Also other groups, and MLX's floating formats.")
@click.option("--questions", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Also ask these.")
@click.option("--ablation", is_flag=True, help="Also GPTQ without each of its steps, and without all.")
@click.option("--beside", is_flag=True, help="Also mlx-lm's methods, at the sizes of the fitted widths.")
def main(
    model: str,
    text: Any,
    calibration: str | None,
    group_size: int,
    bits: str,
    tokens: int,
    calibration_tokens: int,
    name: str | None,
    dtype: str | None,
    methods: tuple[str, ...],
    gptq_bits: str,
    others: bool,
    questions: Path | None,
    ablation: bool,
    beside: bool,
) -> None:
    path = Path(model) if model.endswith(".gguf") else resolve(model)
    name = name or path.stem
    source = CheckedSource(open_source(path), dtype=dtype)
    widths = [int(width) for width in bits.split(",")]
    fitted = [width for width in widths if str(width) in gptq_bits.split(",")]
    told = click.get_current_context().get_parameter_source("gptq_bits") is not ParameterSource.DEFAULT
    if told and (idle := {*filter(None, gptq_bits.split(","))} - {*map(str, widths)}):
        raise click.UsageError(f"--gptq-bits has {', '.join(sorted(idle))}, which --bits {bits} has not")
    with tempfile.TemporaryDirectory() as folder:
        extras = Path(folder, "extras")
        extras.mkdir()
        source.write_extras(extras)
        write_json(extras / "config.json", source.raw_config)
        tokenizer = read_tokenizer(extras)
        read = tokenizer.encode(text.read() if text else bundled("sample"))[:tokens]
        given = calibration if calibration in (None, "self") else Path(calibration).read_text(encoding="utf-8")
        calibrating = FittedText(source, given, 0)
        calibrating.make(None, force=False, progress=None)
        ids = calibrating.ids[:calibration_tokens]
        facts: dict[str, Any] = {
            "model": path.stem,
            "text": text.name if text else "the bundled sample",
            "tokens": len(read),
            "calibration": calibration or "the bundled calibration text",
            "calibration_tokens": len(ids),
            "group_size": group_size,
        }

        def keep(rows: list[dict[str, Any]]) -> None:
            record.write(f"quantization-{name}", rows, *(("mlx", "mlx-lm") if beside else ("mlx",)), **facts)

        points = Points(source, tokenizer, tokenizer.decode(read), ids, Path(folder), keep, questions)
        alike(points, widths, fitted, group_size, methods)
        if others:
            formats(points, widths, fitted, group_size)
        if ablation:
            for width in fitted:
                for left_out, steps in _ABLATION.items():
                    points.make(f"gptq without {left_out}", uniform(width, group_size), steps)
        if "mixed" in methods:
            facts["seconds_measuring"] = mixed(points, widths, fitted, group_size, distill="distill" in methods)
            keep(points.rows)
        if beside:
            for width in fitted:
                size = 8 * Layout.of(source, uniform(width, group_size)).nbytes / weights_of(source)
                for method in theirs.METHODS:
                    points.beside(method, width, group_size, size)
    if "mixed" in methods:
        drawn, title = [row for row in points.rows if "kl" in row], f"{name}: {facts['text']}, {len(read):,} tokens"
        plots.curves(drawn, title, record.RESULTS / f"quantization-{name}.png")


if __name__ == "__main__":
    main()
