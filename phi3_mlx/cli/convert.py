"""phi3-mlx convert"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .options import dtype_option, in_options, revision_option
from .progress import Pulse
from .reading import read_input
from .terminal import escape, note, progress_bar, say, show_rich

if TYPE_CHECKING:
    from ..conversion import Conversion
    from ..conversion.sinks import Progress


@click.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, metavar="DST", help="The directory to write.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Bits a weight. Without it: 4.")
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale. Without it: 64."
)
@click.option(
    "--mode",
    type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]),
    default="affine",
    show_default=True,
    help="affine: integers with scale and bias; the others are floating formats with bits and group of their own.",
)
@dtype_option("Type of all that is not quantized, scales included. Without it: the model's own.")
@click.option("--dequantize", is_flag=True, help="Write plain weights, dequantized and fused.")
@click.option("--target-bpw", type=float, metavar="X", help="Choose bits layer by layer: X bits a weight in all.")
@click.option("--target-size", metavar="SIZE", help="The same by size: 2.0GB.")
@click.option("--recipe", metavar="FILE", help="Bits layer by layer as in this file: recipe.json of an earlier run.")
@click.option(
    "--method",
    type=click.Choice(["round", "gptq"]),
    default="round",
    show_default=True,
    help="gptq: round so that the layers' outputs on a text change least; slower, better.",
)
@click.option("--calibration", metavar="FILE", help="The text that gptq and --target-… read. Without it: a sample.")
@click.option("--text", metavar="FILE", help="The text that the report reads. Without it: another sample.")
@click.option(
    "--report/--no-report",
    default=None,
    help="Compare with SRC on the text and write REPORT.md; done without asking where both fit in memory.",
)
@click.option(
    "--force", is_flag=True, help="Go on where DST exists already (it is replaced) or there is too little memory."
)
@click.option("--allow-nan", is_flag=True, help="Convert weights that are NaN or infinite.")
@revision_option
def convert(
    source: str,
    output: str,
    bits: str | None,
    group_size: str | None,
    mode: str,
    dtype: str | None,
    dequantize: bool,
    target_bpw: float | None,
    target_size: str | None,
    recipe: str | None,
    method: Any,
    calibration: str | None,
    text: str | None,
    report: bool | None,
    force: bool,
    allow_nan: bool,
    revision: str | None,
) -> None:
    """Convert a checkpoint to a small MLX model: 4 bits a weight unless you say otherwise.

    SRC is a name of `phi3-mlx models`, a directory, a Hugging Face repository (OWNER/REPO) or a GGUF file. DST appears
    when it is complete.

    \b
    phi3-mlx convert phi-3.5-mini -o phi-3.5-mini-4bit
    phi3-mlx convert phi-3.5-mini -o small --target-bpw 3.5 --method gptq
    phi3-mlx convert model.gguf -o model --bits 8
    """
    from ..conversion import convert as convert_model

    with _Bar() as bar:
        done = convert_model(
            source,
            output,
            bits=None if bits is None else int(bits),
            group_size=None if group_size is None else int(group_size),
            mode=mode,
            dtype=dtype,
            dequantize=dequantize,
            target_bpw=target_bpw,
            target_size=target_size,
            recipe=recipe,
            method=method,
            calibration=None if calibration is None else read_input(calibration),
            text=None if text is None else read_input(text),
            report=report,
            force=force,
            allow_nan=allow_nan,
            revision=revision,
            progress=bar.update,
        )
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
        note(f"kept unpacked, since the groups do not divide their width: {', '.join(done.kept)}")
    say(f"{done.path}: {size_text(done.bytes)}, {done.bits_per_weight:.2f} bits a weight")


class _Bar:
    """What is being done, how far it is and the time left, on a terminal; a line now and then in a log."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._pulse = Pulse()
        self._stage = ""

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
            self._bar = progress_bar(*columns)
            self._bar.start()
            self._bar.add_task("loading", total=None, count="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, now: Progress) -> None:
        from ..sizes import size_text

        count = f"{now.done:,} of {now.total:,} {now.unit}"
        if now.all_bytes:
            count += f", {size_text(now.bytes)} of {size_text(now.all_bytes)}"
        if self._bar is None:
            self._pulse.say(f"{now.stage}: {count}")
            return
        if now.stage != self._stage:  # each has a time of its own
            for task in list(self._bar.task_ids):
                self._bar.remove_task(task)
            self._stage, self._task = now.stage, self._bar.add_task(escape(now.stage), total=1.0, count="")
        share = now.bytes / now.all_bytes if now.all_bytes else now.done / now.total
        self._bar.update(self._task, completed=share, count=count)
