"""phi3-mlx convert"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..conversion.options import ConvertOptions
from .declare import options_of
from .options import in_options
from .progress import Pulse
from .reading import read_input
from .terminal import escape, note, progress_bar, say, show_rich

if TYPE_CHECKING:
    from ..conversion.pipeline import Conversion
    from ..conversion.sinks import Progress


@click.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, metavar="DST", help="The directory to write.")
@options_of("options", ConvertOptions, then={"calibration": read_input, "text": read_input})
def convert(source: str, output: str, options: ConvertOptions) -> None:
    """Convert a checkpoint to a small MLX model: 4 bits a weight unless you say otherwise.

    SRC is a name of `phi3-mlx models`, a directory, a Hugging Face repository (OWNER/REPO) or a GGUF file. DST appears
    when it is complete.

    \b
    phi3-mlx convert phi-3.5-mini -o mini-4bit
    phi3-mlx convert phi-3.5-mini -o small --target-bpw 3.5 --method gptq
    phi3-mlx convert model.gguf -o model --bits 8
    """
    from ..conversion.pipeline import convert_as

    with _Bar() as bar:
        done = convert_as(source, output, options, progress=bar.update)
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
