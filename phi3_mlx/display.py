"""Progress of long work, in a notebook or on a terminal."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Sequence
from typing import Any

_EVERY = 0.1  # seconds between two pictures of a bar
_SOON = 5.0  # seconds of work, before which its speed is a guess


def duration_text(seconds: float) -> str:
    """Seconds as people read them: "45 seconds", "12 minutes", "1.5 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class ProgressBar:
    """Follows long work in a notebook cell or on a terminal, with the time that is left; silent in a pipe.

        stream_generate(model, tokenizer, prompt, on_prefill=ProgressBar("reading"))
        convert(source, destination, progress=ProgressBar())
        compare(model_a, tokenizer_a, model_b, tokenizer_b, text, progress=ProgressBar("comparing"))
        tune(model, data, output, on_step=ProgressBar("training"))
        evaluate(model, tokenizer, tasks, progress=ProgressBar("evaluating"))

    Call it with (done, total), with (stage, done, total), or with one report that has `done` and `total`, or `step` and
    `steps`.
    """

    def __init__(self, label: str = ""):
        self._label = label
        self._shown = 0.0
        self._stage, self._last = "", 0
        self._began, self._before = 0.0, 0  # when this work began, and what was done then
        self._handle: Any = None
        self._notebook = _in_notebook()

    def __call__(self, *report: Any) -> None:
        label, done, total, more = self._read(report)
        now = time.monotonic()
        if label != self._stage or done < self._last or not self._began:
            self._stage, self._began, self._before = label, now, done
        self._last = done
        if done < total and now - self._shown < _EVERY:
            return
        self._shown = now
        text = f"{label} {done:,} of {total:,}{more}{self._time_left(now, done, total)}".strip()
        if self._notebook:
            self._display(text, done, total)
        elif sys.stderr.isatty():
            filled = round(30 * done / total) if total else 30
            end = "\n" if done == total else ""
            print(f"\r[{'#' * filled:30}] {text}\033[K", end=end, file=sys.stderr, flush=True)

    def _time_left(self, now: float, done: int, total: int) -> str:
        """By the speed so far: what an earlier run had done was there at once, and counts for nothing."""
        took = now - self._began
        if took < _SOON or not self._before < done < total:
            return ""
        return f", about {duration_text((total - done) * took / (done - self._before))} left"

    def _read(self, report: Sequence[Any]) -> tuple[str, int, int, str]:
        """(label, done, total, what else there is to say)"""
        if len(report) == 2:
            return self._label, report[0], report[1], ""
        if len(report) == 3:
            return self._label or report[0], report[1], report[2], ""
        (progress,) = report
        if hasattr(progress, "steps"):
            return self._label, progress.step, progress.steps, f", loss {progress.loss:.3f}"
        return self._label or progress.stage, progress.done, progress.total, f" {progress.unit}"

    def _display(self, text: str, done: int, total: int) -> None:
        from IPython.display import HTML, display

        bar = f'<progress value="{done}" max="{total}" style="width: 20em"></progress>'
        # The text alone for where no HTML is shown.
        data = {"text/html": HTML(f"{bar} {html.escape(text)}").data, "text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
