"""phi3-mlx convert"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..conversion.options import ConvertOptions
from ..paths import expanded, is_gguf
from .declare import options_of
from .measuring import EVALUATION, TASKS, Cost
from .options import ModelOptions, in_options
from .progress import ConversionProgress, kept_when_stopped
from .reading import read_calibration, read_input
from .terminal import note, say, show_rich

if TYPE_CHECKING:
    from ..conversion.pipeline import Conversion


@click.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, metavar="DST", help="The directory to write.")
@click.option("--tasks", **TASKS)
@options_of("options", ConvertOptions, then={"calibration": read_calibration, "text": read_input})
def convert(source: str, output: str, tasks: str | None, options: ConvertOptions) -> None:
    """Convert a checkpoint to a small MLX model: 4 bits a weight unless you say otherwise.

    SRC is a name of `phi3-mlx models`, a directory, a Hugging Face repository (OWNER/REPO) or a GGUF file. DST appears
    when it is complete.

    \b
    phi3-mlx convert phi-3.5-mini -o mini-4bit
    phi3-mlx convert phi-3.5-mini -o small --target-bpw 3.5 --method gptq
    phi3-mlx convert phi-3.5-mini -o better --effort best --calibration self
    phi3-mlx convert model.gguf -o model --bits 8
    """
    from ..conversion.pipeline import convert_as

    cost = None if tasks is None else Cost(tasks)
    with kept_when_stopped(output, options.rounding), ConversionProgress() as bar:

        def measure(before: str, after: Path) -> str:
            bar.close()
            loaded: ModelOptions | None = ModelOptions(model=before, revision=options.revision)
            if is_gguf(expanded(before)):
                note(f"{before} is a GGUF file, which answers no questions: only the result is asked")
                loaded = None
            assert cost is not None
            asked = cost.of(loaded, ModelOptions(model=os.path.abspath(after)), after / EVALUATION)
            return f"## Tasks\n\n{asked}\nMore is in `{EVALUATION}/`.\n"

        done = convert_as(source, output, options, progress=bar.update, measure=measure if cost else None)
    _describe(done)


def _describe(done: Conversion) -> None:
    """What was made: a table of what it cost on stdout, the rest on stderr."""
    from ..sizes import size_text

    if done.report is not None:
        from ..conversion.report import table

        show_rich(table(done.report))
    for sentence in done.notes:
        note(in_options(sentence, click.get_current_context().command))
    if done.kept:
        note(f"kept in floats, since the groups do not divide their width: {', '.join(done.kept)}")
    say(f"{done.path}: {size_text(done.bytes)}, {done.bits_per_weight:.2f} bits a weight")
