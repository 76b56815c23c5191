"""Progress of long work: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TypeVar

from .terminal import escape, progress_bar, say

if TYPE_CHECKING:
    from ..conversion.sinks import Progress

_Work = TypeVar("_Work", bound="LongWork")
_LONG_PROMPT = 2048  # tokens; a shorter one is read before a bar would be seen


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


class LongWork:
    """How far long work is, while a `with` block lasts: a bar on a terminal, a line now and then in a log.

    `label` says what is being done. Without `shown` there is no bar.
    """

    def __init__(self, label: str, *, shown: bool = True):
        self._label, self._pulse = label, Pulse()
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn

            self._bar = progress_bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
            self._task = self._bar.add_task(label, total=None, count="")

    def __enter__(self: _Work) -> _Work:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, label: str, done: int, total: int, count: str, log: str) -> None:
        """`count` beside a bar, filled for `done` of `total`, or the line `log`; a new label starts a new bar."""
        if self._bar is None:
            self._pulse.say(log)
            return
        if label != self._label:
            self._label = label
            self._bar.reset(self._task, description=escape(label), count="")
        self._bar.update(self._task, completed=done, total=total, count=count)


class ReadingProgress(LongWork):
    """How many `unit` were read."""

    def __init__(self, unit: str = "tokens", *, label: str = "reading", shown: bool = True):
        super().__init__(label, shown=shown)
        self._unit = unit

    def update(self, done: int, total: int) -> None:
        count = f"{done:,} of {total:,} {self._unit}"
        self._show(self._label, done, total, count, f"read {count}")


class PrefillProgress(ReadingProgress):
    """How many tokens of a long prompt were read; the bar goes before the answer begins."""

    def __init__(self, total: int):
        super().__init__(label="reading the prompt", shown=total > _LONG_PROMPT)

    def update(self, done: int, total: int) -> None:
        if done < total:
            super().update(done, total)
        else:
            self._stop()


class ConversionProgress(LongWork):
    """Which stage a conversion is in, and how far that is."""

    def __init__(self) -> None:
        super().__init__("loading")

    def update(self, now: Progress) -> None:
        from ..sizes import size_text

        count = f"{now.done:,} of {now.total:,} {now.unit}"
        if now.all_bytes:
            count += f", {size_text(now.bytes)} of {size_text(now.all_bytes)}"
        done, total = (now.bytes, now.all_bytes) if now.all_bytes else (now.done, now.total)
        self._show(now.stage, done, total, count, f"{now.stage}: {count}")
