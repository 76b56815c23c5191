"""The folder of a run: who may write there, and what is written while the trainer works.

ADAPTER/
  adapters.safetensors, adapter_config.json   the best adapter by validation, or the last without any
  last/                                       the same of the last step
  checkpoints/                                what a run that is resumed goes on from
  metrics.jsonl  loss.png  samples.jsonl  run.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import read_json
from ..errors import CheckpointError, TrainingError
from ..files import json_text
from ..store.atomic import FINDER, hold, is_partial, replace_file
from .checkpoints import newest_checkpoint
from .log import METRICS, SAMPLES, Log, StepLines, plot_losses
from .run_settings import RunSettings

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer
    from .events import StepReport, Validated
    from .trainer import Trainer

Write = Callable[[Path, int], None]  # a run's product, after this many steps, into a directory
RUN, CHECKPOINTS, LAST = "run.json", "checkpoints", "last"


def check_folder(output: Path, resume: bool) -> None:
    """TrainingError unless a run may begin in `output`, or go on there.

    One that ended before its first checkpoint, whatever ended it, may do both.
    """
    begun = _describes_a_run(output / RUN)
    if resume:
        if not begun and newest_checkpoint(output / CHECKPOINTS) is None:
            raise TrainingError(f"{output} has no checkpoint to go on from; begin it without resume=True")
        return
    if not output.exists():
        return
    if not output.is_dir() or not all(map(_is_of_a_start, output.iterdir())):
        on = "resume=True goes on with it, or" if begun else "it holds no run to go on with, so"
        raise TrainingError(f"{output} exists already; {on} name another folder with output=DIR")


def _is_of_a_start(path: Path) -> bool:
    """Whether it is what a run writes before its first checkpoint."""
    if path.name == CHECKPOINTS:
        return path.is_dir() and all(map(_is_nothing, path.iterdir()))
    if path.name == RUN:
        return _describes_a_run(path)
    return (path.name == METRICS and not path.stat().st_size) or _is_nothing(path)


def _is_nothing(path: Path) -> bool:
    return path.name == FINDER or is_partial(path)


def _describes_a_run(path: Path) -> bool:
    try:
        return "settings" in read_json(path)
    except CheckpointError:
        return False


@contextmanager
def taken(output: Path, resume: bool) -> Iterator[None]:
    """Hold the folder, which is made if need be, for this run alone. What is empty in the end is removed.

    Raises TrainingError: another run writes there, or nothing can be written.
    """
    new = not output.exists()
    with contextlib.ExitStack() as stack:
        with _explained(output, "name another folder with output=DIR"):
            mine = stack.enter_context(hold(output))
        if not mine:
            raise TrainingError(
                f"another run is writing into {output}; wait for its end, or name another folder with output=DIR"
            )
        try:
            check_folder(output, resume)  # again: another run may have begun and ended since
            yield
        except BaseException:
            if newest_checkpoint(output / CHECKPOINTS) is None and not resume:
                _clear(output, new)
            raise


def _clear(output: Path, new: bool) -> None:
    """Take away what a run wrote that did not begin."""
    with contextlib.suppress(OSError):
        if all(map(_is_of_a_start, output.iterdir())):
            for name in (RUN, METRICS):
                (output / name).unlink(missing_ok=True)
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
            if new:
                output.rmdir()


@contextmanager
def _explained(output: Path, way_out: str) -> Iterator[None]:
    """Files that cannot be written end a run with a TrainingError."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or output} cannot be written: {error.strerror or error}; {way_out}"
        ) from error


_GO_ON = "fix that and continue with resume=True"


@dataclass
class RunFolder:
    """What the first process of a run writes while the trainer works; the others write nothing."""

    output: Path
    settings: RunSettings
    facts: Mapping[str, Any]  # of run.json, beside the settings
    tokenizer: Tokenizer
    model: Model
    write: Write
    trainer: Trainer
    on_step: Callable[[StepReport], None] | None = None
    on_validation: Validated | None = None
    on_sample: Callable[[str, str], None] | None = None
    notify: Callable[[str], None] | None = None
    valid_figures: Callable[[float], dict[str, float]] | None = None
    notes: list[str] = field(default_factory=list)  # of what happened while it ran

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The files of the run, open; at the end, however it comes, the last product and the plot are written."""
        step = self.trainer.progress.step
        with _explained(self.output, _GO_ON if step else "fix that and start over"):
            facts = {"settings": self.settings.as_dict(), **self.facts}
            replace_file(self.output / RUN, f"{json_text(facts, indent=2)}\n".encode())
            self.trainer.save()  # so that even a run killed in its first steps can be resumed
            self._log = Log(self.output, step, self.settings.tensorboard)
            self._samples = StepLines(self.output / SAMPLES, step) if self.settings.samples else None
        try:
            yield
        except BaseException:
            for end in self._ends():  # as much as can be written; what ended the run is what is told
                with contextlib.suppress(Exception):
                    end()
            raise
        with _explained(self.output, _GO_ON):
            for end in self._ends():
                end()

    def _ends(self) -> Iterator[Callable[[], None]]:
        yield self._log.close
        if self._samples is not None:
            yield self._samples.close
        if self.trainer.is_finite():
            yield lambda: self._write(self.output / LAST)
            if self.trainer.progress.best_step is None:
                yield lambda: self._write(self.output)
        yield self._plot

    def _plot(self) -> None:
        try:
            drawn = plot_losses(self.output, self.trainer.progress.best_step)
        except Exception as error:  # a run is no failure because its plot is one
            self.note(f"no loss.png: {error}")
        else:
            if not drawn and self.notify:
                self.notify('no loss.png, which needs matplotlib: pip install "phi3-mlx[plot]"')

    def note(self, sentence: str) -> None:
        """Tell and keep a sentence."""
        self.notes.append(sentence)
        if self.notify:
            self.notify(sentence)

    def step(self, report: StepReport) -> None:
        figures = dataclasses.asdict(report)
        del figures["step"], figures["steps"]
        figures |= figures.pop("figures")
        with _explained(self.output, _GO_ON):
            self._log.add("train", report.step, **figures)
        if self.on_step:
            self.on_step(report)

    def validated(self, step: int, loss: float, best: bool, figures: Mapping[str, float]) -> None:
        if self.valid_figures:
            figures = {**figures, **self.valid_figures(loss)}
        with _explained(self.output, _GO_ON):
            self._log.add("valid", step, loss=loss, **figures)
            if best:
                self._write(self.output)
        if self.on_validation:
            self.on_validation(step, loss, best, figures)
        if self._samples is not None:
            self._answer(self._samples, step)

    def _write(self, directory: Path) -> None:
        self.write(directory, self.trainer.progress.step)

    def _answer(self, lines: StepLines, step: int) -> None:
        from ..generation.answers import generate

        self.model.eval()
        for prompt in self.settings.samples:
            line: dict[str, Any] = {"step": step, "prompt": prompt}
            try:
                line["answer"] = generate(self.model, self.tokenizer, prompt, max_tokens=self.settings.sample_tokens)
            except Exception as error:  # the run goes on: an answer is no part of it
                line["error"] = str(error)
                self.note(f"the sample {prompt!r} was not answered at step {step:,}: {error}")
            with _explained(self.output, _GO_ON):
                lines.add(line)
            if "answer" in line and self.on_sample:
                self.on_sample(prompt, line["answer"])
