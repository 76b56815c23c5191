"""KL divergence against bits per weight: all layers alike, bits by sensitivity, GPTQ, and both together.

    python -m bench quantization MODEL [--text FILE] [--calibration FILE] [--group-size N] [--tokens N]

MODEL is a name, a directory or a GGUF file. Sensitivity and GPTQ read the calibration text, the figures come from the
other one; by default both are texts that come with the package. The result is `quantization-NAME`, drawn in
results/quantization-NAME.png. The published figures of the bundled model are of its
checkpoint before packing and of stories that weights/training/data.py splits off; those of SmolLM2-135M-Instruct are of
its Q4_1 GGUF file, converted with --dequantize --dtype float32.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click

from phi3_mlx import compare, resolve
from phi3_mlx.conversion.gptq import calibrated
from phi3_mlx.conversion.layout import Layout, Rounder
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.recipes import Recipe, uniform
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.sensitivity import BITS, allocate, as_recipe, measure, sizes_of
from phi3_mlx.conversion.sources import Source, weights_of
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.conversion.writer import DirectorySink, write_json
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.text.tokenizer import read_tokenizer

from . import plots, record

_MIXED = (2.75, 3.0, 3.25, 3.75, 4.0, 4.25, 4.75, 5.0, 5.25, 6.0, 7.0, 8.0)  # beside uniform's own sizes


def _write(directory: Path, source: Source, layout: Layout, arrays: Rounder) -> float:
    """A model directory without a tokenizer; returns its bits per weight."""
    directory.mkdir()
    sink = DirectorySink(directory)
    sink.write(layout, arrays)
    sink.write_config(source.raw_config, layout)
    return 8 * layout.nbytes / weights_of(source)


@click.command(help=__doc__)
@click.argument("model")
@click.option("--text", type=click.File(encoding="utf-8"), help="What the figures are measured on.")
@click.option("--calibration", type=click.File(encoding="utf-8"), help="What sensitivity and GPTQ read.")
@click.option("--group-size", type=int, default=64, show_default=True)
@click.option("--bits", default="2,3,4,5,6,8", show_default=True, help="Uniform widths.")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Of the text, at most.")
@click.option("--calibration-tokens", type=int, default=16384, show_default=True, help="Of the other, at most.")
@click.option("--name", help="Of the result files; MODEL's last part without it.")
@click.option("--gptq-bits", default="2,3,4,5,6,8", show_default=True, help='Of them those also fitted; "": none.')
def main(
    model: str,
    text: Any,
    calibration: Any,
    group_size: int,
    bits: str,
    tokens: int,
    calibration_tokens: int,
    name: str | None,
    gptq_bits: str,
) -> None:
    path = Path(model) if model.endswith(".gguf") else resolve(model)
    name = name or path.stem
    source = open_source(path)
    with tempfile.TemporaryDirectory() as folder:
        extras = Path(folder, "extras")
        extras.mkdir()
        source.write_extras(extras)
        write_json(extras / "config.json", source.raw_config)
        tokenizer = read_tokenizer(extras)
        read = tokenizer.encode(text.read() if text else bundled("sample"))[:tokens]
        words = tokenizer.decode(read)
        ids = tokenizer.encode(calibration.read() if calibration else bundled("calibration"))[:calibration_tokens]
        _write(Path(folder, "reference"), source, Layout.of(source, None), rounded(source))
        reference = read_model(Path(folder, "reference"))
        rows: list[dict[str, Any]] = []

        def point(method: str, recipe: Recipe, gptq: bool) -> None:
            directory = Path(folder, str(len(rows)))
            start = time.perf_counter()
            layout = Layout.of(source, recipe)
            arrays = calibrated(source, layout, ids) if gptq else rounded(source)
            size = _write(directory, source, layout, arrays)
            seconds = time.perf_counter() - start
            found = compare(reference, tokenizer, read_model(directory), tokenizer, words)
            assert found.kl is not None
            figures = {"kl": found.kl, "top1": found.top1, "perplexity": found.b.perplexity}
            rows.append({"method": method, "bits_per_weight": size, **figures, "seconds": seconds})
            rows[-1]["original_perplexity"] = found.a.perplexity
            click.echo(
                f"{method:12} {size:6.3f} bits per weight  KL {found.kl:.5f}  perplexity {found.b.perplexity:.3f}"
            )

        start = time.perf_counter()
        costs = measure(source, ids, group_size=group_size)
        measured = time.perf_counter() - start
        sizes, fixed = sizes_of(source, group_size, BITS)
        weights = weights_of(source)
        widths = [int(width) for width in bits.split(",")]
        fitted = [width for width in widths if str(width) in gptq_bits.split(",")]
        alike = {width: fixed + sum(of[width] for of in sizes.values()) for width in widths}
        for width in widths:
            point("uniform", uniform(width, group_size), gptq=False)
            if width in fitted:
                point("gptq", uniform(width, group_size), gptq=True)
        ends = min(alike.values()), max(alike.values())
        between = {int(bpw * weights / 8) for bpw in _MIXED} | set(alike.values())
        for size in sorted(size for size in between if ends[0] <= size <= ends[1]):
            recipe = as_recipe(allocate(costs, sizes, size - fixed), sizes, group_size)
            point("mixed", recipe, gptq=False)
            if size in [alike[width] for width in fitted]:
                point("mixed + gptq", recipe, gptq=True)
    facts = {
        "model": name,
        "text": text.name if text else "the bundled sample",
        "tokens": len(read),
        "calibration": calibration.name if calibration else "the bundled calibration text",
        "calibration_tokens": len(ids),
        "group_size": group_size,
        "seconds_measuring": measured,
    }
    result = f"quantization-{name}"
    record.write(result, rows, "mlx", **facts)
    plots.curves(rows, f"{name}: {facts['text']}, {len(read):,} tokens", record.RESULTS / f"{result}.png")


if __name__ == "__main__":
    main()
