"""What the commands that train share: their options, the line that follows a run, and how it ended."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..display import duration_text
from ..doctor.checks import WATCHDOG
from ..paths import expanded
from .declare import declare
from .options import REQUEST_FIELDS
from .progress import Pulse
from .terminal import note, redraw, say

if TYPE_CHECKING:
    from ..tuning.events import StepReport
    from ..tuning.execution import Result
    from ..tuning.run_settings import RunSettings, S


class TrainingCommand(click.Command):
    """A command whose options are the fields of some `settings`, read when they are needed, and `more`.

    `argument`: the field that is no option. `moved`: the options that say where things are when a run goes on.
    """

    def __init__(
        self,
        name: str,
        settings: Callable[[], type[RunSettings]],
        *,
        callback: Callable[..., None],
        moved: str,
        argument: str | None = None,
        more: Sequence[click.Parameter] = (),
        help: str,
    ):
        super().__init__(name, callback=callback, params=[], help=help)
        self._settings, self._moved, self._argument, self._more = settings, moved, argument, more

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            ctx.meta[WATCHDOG] = relax_watchdog()
            self.params = [*self._setting_params(), *self._run_params()]
        return super().get_params(ctx)

    def _setting_params(self) -> list[click.Parameter]:
        from ..tuning.run_settings import in_order

        # No defaults here: what is not given may come from a file or from the run that is resumed.
        params: list[click.Parameter] = []
        for field in in_order(self._settings()):
            flags, told = declare(field, default=None)
            alone = field.name == self._argument
            params.append(
                click.Argument([field.name], required=False, metavar=told["metavar"])
                if alone
                else click.Option(flags, **told)
            )
        return params

    def _run_params(self) -> list[click.Parameter]:
        return [
            click.Option(
                ["-c", "--config", "settings_file"],
                metavar="FILE",
                help="A YAML file with these settings (max_length: 512); options override it.",
            ),
            click.Option(
                ["--resume"],
                is_flag=True,
                help=f"Continue the run in -o with its settings; {self._moved} say where these are now.",
            ),
            *self._more,
            click.Option(["--dry-run"], is_flag=True, help="Show data, examples, memory and time; do not train."),
            click.Option(["--force"], is_flag=True, help=REQUEST_FIELDS["force"].metadata["help"]),
        ]


class Chosen(NamedTuple):
    """What was chosen for a run: options, and settings of a YAML file, which the options overrule."""

    options: dict[str, Any]
    file: dict[str, Any]

    @classmethod
    def of(cls, kind: type[RunSettings], options: Mapping[str, Any], file: str | None) -> Chosen:
        from ..tuning.settings_file import read_settings

        given = {name: value for name, value in options.items() if value not in (None, ())}
        return cls(given, read_settings(Path(file), kind) if file else {})

    @property
    def together(self) -> dict[str, Any]:
        return {**self.file, **self.options}

    def settings(self, kind: type[S], needed: Mapping[str, str], *, dry_run: bool) -> S:
        """Those of a new run. `needed`: what must be given, and what the command line calls it."""
        for name, called in needed.items():
            if not self.together.get(name) and not (dry_run and name == "output"):
                raise click.UsageError(f"Missing {called}")
        return kind.of({"output": "(dry run)", **self.options} if dry_run else self.options, self.file)

    def resumed(self) -> Path:
        """The folder of the run that goes on."""
        if not self.together.get("output"):
            raise click.UsageError("--resume needs -o, the folder of the run to continue")
        return expanded(self.together["output"])


def relax_watchdog() -> bool:
    """On a Mac, tell Metal to let long kernels be; to be called before MLX is imported. True if it was not told yet."""
    if sys.platform != "darwin" or WATCHDOG in os.environ:
        return False
    os.environ[WATCHDOG] = "1"
    return True


def say_watchdog() -> None:
    """Say so where the command that runs has relaxed Metal's watchdog."""
    if click.get_current_context().meta.get(WATCHDOG):
        note(f"{WATCHDOG}=1 is set, so that macOS does not kill long steps")


def end_run(result: Result, tokens: int, command: str) -> None:
    """Say how a run of a command ended, and end the command as the run was told to end."""
    from ..tuning.signals import pass_on

    if result.first_rank:
        summarize(result, tokens, command)
    pass_on(result.signal)
    if result.interrupted:
        raise KeyboardInterrupt


def summarize(result: Result, tokens: int, command: str) -> None:
    """Say how a run of a command ended.

    `tokens` were read by this command; those of the result are the whole run's, which may have been resumed.
    """
    from ..tuning.execution import best_text

    steps = "1 step" if result.step == 1 else f"{result.step:,} steps"
    best = f", {best_text(result)} at step {result.best_step}" if result.best_step else ""
    speed = f", {tokens / result.seconds:,.0f} tok/s" if tokens else ""
    say(f"{steps}{best}{speed}; the {result.product} is in {result.output}")
    if not result.finished and not result.interrupted:
        say("stopped early, because validation no longer improved (--patience)")
    if result.interrupted:
        say(f"saved; continue with: phi3-mlx {command} --resume -o {shlex.quote(str(result.output))}")


class TrainingLine:
    """A line on the terminal that follows the run; in a log file, a line now and then and one for each validation."""

    def __init__(self) -> None:
        self.tokens = 0
        self._live = sys.stderr.isatty()
        self._pulse = Pulse()
        self._started: tuple[float, int] | None = None
        self._recent, self._seconds = 0.0, 0.0  # tokens, and seconds that they took

    def __enter__(self) -> TrainingLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the line, for what is to be said."""
        if self._live and self._started:
            say()
        self._started = None

    def step(self, report: StepReport) -> None:
        from ..sizes import size_text

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

    def reference(self, done: int, total: int) -> None:
        line = f"reading the answers with the model as it is: {done:,}/{total:,}"
        if self._live:
            redraw(line, "\n" if done == total else "")
        else:
            self._pulse.say(line)

    def validated(self, step: int, loss: float, best: bool, figures: Mapping[str, float]) -> None:
        told = f"step {step:,}: validation loss {loss:.4f}"
        if "bits_per_character" in figures:
            told += f", {figures['bits_per_character']:.4f} bits a character"
        if "accuracy" in figures:
            told += f", {figures['accuracy']:.0%} of the pairs right, margin {figures['margin']:.3g}"
        self._say(f"{told}{', the best so far' if best else ''}")

    def sample(self, prompt: str, answer: str) -> None:
        self._say(f"  {prompt!r} -> {answer!r}")

    def _say(self, text: str) -> None:
        if self._live:
            redraw(text, "\n")
        else:
            say(text)
