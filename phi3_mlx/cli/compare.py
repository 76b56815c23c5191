"""phi3-mlx compare"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckpointError
from ..evaluation.options import CompareOptions
from .declare import options_of
from .options import compute_dtype, within_memory
from .progress import ReadingProgress
from .reading import read_input
from .terminal import show, show_json

if TYPE_CHECKING:
    from ..evaluation.quality import Comparison, Quality


_REPORT = click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Also compare layer by layer, and write REPORT.md, report.json and report.png into this new directory.",
)


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--text", metavar="FILE", help='The text both read; "-" is stdin. Without it: a sample.')
@options_of("options", CompareOptions, before={"force": [compute_dtype, _REPORT, within_memory]})
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def compare(
    a: str, b: str, text: str | None, options: CompareOptions, dtype: str | None, output: str | None, as_json: bool
) -> None:
    """Say how far apart two models are on a text: perplexities, KL divergence, same likeliest token.

    A is the one to be compared with, usually the original; both are names of `phi3-mlx models`, directories or Hugging
    Face repositories, and both are in memory together. Models that spell the text with different tokens can only be
    compared by perplexity per character.

    \b
    phi3-mlx compare phi-3.5-mini-8bit phi-3.5-mini-4bit --text book.txt
    phi3-mlx compare phi-3.5-mini phi-3.5-mini-4bit --text book.txt -o report
    """
    window = options.window
    if window < 1:
        raise click.UsageError(f"--window {window} is outside its range; give 1 or more")
    if output is not None and os.path.lexists(output):
        raise CheckpointError(f"{output} exists already; name another directory")
    content = None if text is None else read_input(text)
    from ..conversion import report
    from ..conversion.opening import open_source
    from ..conversion.sources import weights_of
    from ..conversion.texts import bundled
    from ..evaluation.quality import check_comparison
    from ..evaluation.quality import compare as compare_models
    from ..generation.loading import load
    from ..models import read_config
    from ..store.atomic import new_directory
    from ..store.hub import resolve
    from ..store.safetensors import find_weights

    content = bundled("sample") if content is None else content
    name = "the bundled sample" if text is None else "stdin" if text == "-" else text
    places = [resolve(a), resolve(b)]
    for directory in places:
        read_config(directory)  # which knows the Phi family alone
    loaded = []
    for model, directory in zip((a, b), places, strict=True):  # one is planned when the other is in memory
        if not options.force:
            check_comparison(directory, model, window, dtype)
        loaded.append(load(directory, dtype=dtype, force=True))
    (model_a, tokenizer_a), (model_b, tokenizer_b) = loaded
    with ReadingProgress() as bar:
        comparison = compare_models(
            model_a, tokenizer_a, model_b, tokenizer_b, content, window=window, force=True, progress=bar.update
        )
    del loaded, model_a, model_b
    sources = [open_source(directory) for directory in places]
    sizes = [
        (sum(tensor.nbytes for tensor in find_weights(directory).tensors.values()), weights_of(source))
        for directory, source in zip(places, sources, strict=True)
    ]
    if output is not None:
        sources[0].name = a
        with new_directory(Path(output)) as folder, ReadingProgress("layers") as bar:
            made = report.make_report(
                places[1],
                sources[0],
                text=content,
                text_name=name,
                fitted=False,
                window=window,
                progress=bar.update,
            )
            report.save(replace(made, result=Path(b).name if os.path.isabs(b) else b), folder)
    if as_json:
        facts = {"a": a, "b": b, "text": name, "window": window, **_figures(comparison)}
        for side, (size, weights) in zip("ab", sizes, strict=True):
            facts[f"quality_{side}"] |= {"bytes": size, "bits_per_weight": 8 * size / weights}
        show_json(facts)
        return
    for line in _lines(a, b, name, comparison, sizes):
        show(line)
    if output is not None:
        show(f"\nlayer by layer: {os.path.join(output, 'REPORT.md')}")


def _figures(comparison: Comparison) -> dict[str, Any]:
    """What --json adds to the names."""

    def side_figures(side: Quality) -> dict[str, Any]:
        return {
            "tokens": side.tokens,
            "perplexity": side.perplexity,
            "perplexity_per_character": side.perplexity_per_character,
        }

    return {
        "characters": comparison.a.characters,
        "quality_a": side_figures(comparison.a),
        "quality_b": side_figures(comparison.b),
        "kl": comparison.kl,
        "top1": comparison.top1,
        "note": comparison.note,
    }


def _lines(a: str, b: str, text: str, comparison: Comparison, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """A small table, and below it what belongs to both."""
    rows = [("", "A", "B")]
    if comparison.kl is not None:
        rows.append(("perplexity", f"{comparison.a.perplexity:.3f}", f"{comparison.b.perplexity:.3f}"))
    per_character = [f"{side.perplexity_per_character:.4f}" for side in (comparison.a, comparison.b)]
    rows.append(("perplexity per character", per_character[0], per_character[1]))
    rows.append(("tokens predicted", f"{comparison.a.tokens:,}", f"{comparison.b.tokens:,}"))
    if comparison.kl is not None and comparison.top1 is not None:
        rows.append(("mean KL(A || B), nats a token", "", f"{comparison.kl:.5f}"))
        rows.append(("same likeliest token", "", f"{100 * comparison.top1:.2f} %"))
    (size_a, weights_a), (size_b, weights_b) = sizes
    rows.append(("bits per weight", f"{8 * size_a / weights_a:.3f}", f"{8 * size_b / weights_b:.3f}"))
    rows.append(("bytes", f"{size_a:,}", f"{size_b:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"A: {a}", f"B: {b}", f"text: {text}, {comparison.a.characters:,} characters", ""]
    lines += [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    return lines if comparison.note is None else [*lines, "", f"note: {comparison.note}"]
