"""phi3-mlx tune"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..doctor.checks import WATCHDOG
from .declare import declare
from .options import REQUEST_FIELDS, in_options
from .progress import Pulse
from .terminal import note, redraw, say, show

if TYPE_CHECKING:
    from ..tuning.run import Result
    from ..tuning.trainer import StepReport


def relax_watchdog() -> bool:
    """On a Mac, tell Metal to let long kernels be; to be called before MLX is imported. True if it was not told yet."""
    if sys.platform != "darwin" or WATCHDOG in os.environ:
        return False
    os.environ[WATCHDOG] = "1"
    return True


class _TuneCommand(click.Command):
    """Its options are the fields of `Settings`, read when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            ctx.meta[WATCHDOG] = relax_watchdog()
            self.params = [*_setting_options(), *_RUN_OPTIONS]
        return super().get_params(ctx)


def _setting_options() -> list[click.Parameter]:
    from ..tuning.settings import Settings

    # No defaults here: what is not given may come from run.yaml or from the run that is resumed.
    declared = [declare(field, default=None) for field in dataclasses.fields(Settings)]
    return [click.Option(flags, **told) for flags, told in declared]


_RUN_OPTIONS: list[click.Parameter] = [
    click.Option(
        ["-c", "--config"],
        metavar="FILE",
        help="A YAML file with these settings (max_length: 512); options override it.",
    ),
    click.Option(
        ["--resume"],
        is_flag=True,
        help="Continue the run in -o with its settings; -m, -d and --valid say where these are now.",
    ),
    click.Option(["--dry-run"], is_flag=True, help="Show data, examples, memory and time; do not train."),
    click.Option(["--force"], is_flag=True, help=REQUEST_FIELDS["force"].metadata["help"]),
]


def _tune(config: str | None, resume: bool, dry_run: bool, force: bool, **given: Any) -> None:
    from ..errors import OptionError
    from ..tuning import run
    from ..tuning.settings import Settings, read_settings
    from ..tuning.signals import pass_on
    from ..tuning.stored import comparable, stored_settings
    from ..values import shown

    file: dict[str, Any] = read_settings(Path(config)) if config else {}
    options = {name: value for name, value in given.items() if value not in (None, ())}
    chosen = {**file, **options}
    if resume:
        if not chosen.get("output"):
            raise click.UsageError("--resume needs -o, the folder of the run to continue")
        stored = stored_settings(Path(chosen["output"]))
        settings = dataclasses.replace(stored, **chosen)
        changed = [
            name for name in chosen if name not in run.FREE and comparable(settings, name) != comparable(stored, name)
        ]
        if changed:
            raise OptionError(
                f"--resume uses the settings of the run, and {changed[0]} was "
                f"{shown(getattr(stored, changed[0]))}; leave it out, or start over with another -o"
            )
    else:
        for name, flags in (("data", "'-d' / '--data'"), ("output", "'-o' / '--output'")):
            if not chosen.get(name) and not (dry_run and name == "output"):
                raise click.UsageError(f"Missing option {flags}")
        settings = Settings.of({"output": "(dry run)", **options} if dry_run else options, file)
    command = click.get_current_context().command
    notify = lambda sentence: note(in_options(sentence, command))  # noqa: E731
    if click.get_current_context().meta.get(WATCHDOG):
        note(f"{WATCHDOG}=1 is set, so that macOS does not kill long steps")
    if dry_run:
        from ..tuning.dryrun import STYLES, describe_run

        prepared = run.prepare(settings, fits=False, resume=resume)
        notes, way_out = [in_options(note, command) for note in prepared.notes], in_options(prepared.way_out, command)
        prepared = dataclasses.replace(prepared, notes=tuple(notes), way_out=way_out)
        show(describe_run(prepared, color=sys.stdout.isatty(), force=force), styles=STYLES)
        return
    with _Progress() as progress:
        result = run.start(
            settings,
            resume=resume,
            force=force,
            notify=notify,
            on_step=progress.step,
            on_validation=progress.validated,
            on_sample=progress.sample,
        )
    if result.first_rank:
        _summary(result, progress.tokens)
    pass_on(result.signal)
    if result.interrupted:
        raise KeyboardInterrupt


def _summary(result: Result, tokens: int) -> None:
    """`tokens` were read by this command; those of the result are the whole run's, which may have been resumed."""
    steps = "1 step" if result.step == 1 else f"{result.step:,} steps"
    best = f", best validation loss {result.best_loss:.4f} at step {result.best_step}" if result.best_step else ""
    speed = f", {tokens / result.seconds:,.0f} tok/s" if tokens else ""
    say(f"{steps}{best}{speed}; the adapter is in {result.output}")
    if not result.finished and not result.interrupted:
        say("stopped early, because the validation loss no longer improved (--patience)")
    if result.interrupted:
        say(f"saved; continue with: phi3-mlx tune --resume -o {shlex.quote(str(result.output))}")


class _Progress:
    """A line on the terminal that follows the run; in a log file, a line now and then and one for each validation."""

    def __init__(self) -> None:
        self.tokens = 0
        self._live = sys.stderr.isatty()
        self._pulse = Pulse()
        self._started: tuple[float, int] | None = None
        self._recent, self._seconds = 0.0, 0.0  # tokens, and seconds that they took

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._started:
            say()

    def step(self, report: StepReport) -> None:
        from ..sizes import size_text
        from ..tuning.dryrun import duration_text

        now = time.monotonic()
        self._started = self._started or (now - report.seconds, report.step - 1)
        self.tokens += report.tokens
        # Averages that forget half in about 14 steps.
        self._recent = 0.95 * self._recent + report.tokens
        self._seconds = 0.95 * self._seconds + report.seconds
        left = (now - self._started[0]) / (report.step - self._started[1]) * (report.steps - report.step)
        line = (
            f"step {report.step:,}/{report.steps:,}  epoch {report.epoch:.2f}  loss {report.loss:.4f}  "
            f"{self._recent / self._seconds:,.0f} tok/s  {size_text(report.peak_memory)}  {duration_text(left)} left"
        )
        if self._live:
            redraw(line)
        else:
            self._pulse.say(line)

    def validated(self, step: int, loss: float, best: bool) -> None:
        self._say(f"step {step:,}: validation loss {loss:.4f}{', the best so far' if best else ''}")

    def sample(self, prompt: str, answer: str) -> None:
        self._say(f"  {prompt!r} -> {answer!r}")

    def _say(self, text: str) -> None:
        if self._live:
            redraw(text, "\n")
        else:
            say(text)


tune = _TuneCommand(
    "tune",
    callback=_tune,
    params=[],
    help="""Fine-tune a model on your examples: LoRA (on packed weights too), DoRA, or all weights.

    \b
    phi3-mlx tune -m phi-3.5-mini-4bit -d my.jsonl -o adapter --dry-run
    phi3-mlx tune -m phi-3.5-mini-4bit -d my.jsonl -o adapter
    phi3-mlx generate -m phi-3.5-mini-4bit --adapter adapter -p "..."

    A line of my.jsonl is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. Ctrl-C, kill
    and a closed terminal save a checkpoint; --resume ends with the weights of an uninterrupted run.
    """,
)
