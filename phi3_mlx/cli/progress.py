"""Progress of long work: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from .terminal import progress_bar, say


class Pulse:
    """How far a long run is, where no terminal shows it: a line in half a minute, so that short runs say none."""

    SECONDS = 30.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._last >= self.SECONDS:
            self._last = now
            say(line)


class PrefillProgress:
    """A bar on the terminal while a long prompt is read, a line now and then in a log; nothing for a short one."""

    def __init__(self, total: int):
        self._bar, self._pulse = None, Pulse()
        if sys.stderr.isatty() and total > 2048:
            from rich.progress import BarColumn, TextColumn

            columns = ("reading the prompt", BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,} tokens"))
            self._bar = progress_bar(*columns)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> PrefillProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done)
            if done == total:
                self._bar.stop()
        elif done < total:
            self._pulse.say(f"read {done:,} of {total:,} tokens")
