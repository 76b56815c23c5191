"""Progress of long work: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..display import duration_text
from .terminal import escape, note, progress_bar, say

if TYPE_CHECKING:
    from ..conversion.sinks import Progress
    from ..data.records import Advance

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
        self.close()

    def close(self) -> None:
        """Take the bar away, for what is to be said."""
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


class LeftProgress(LongWork):
    """How much is done, and in a log about how long the rest takes.

    What an earlier run had done is there at once, and says nothing of the speed; nor does the first, which others may
    have been read beside.
    """

    def __init__(self, label: str):
        super().__init__(label)
        self._counted = label
        self._last = self._began = time.monotonic()
        self._before: int | None = None  # what was done then

    def count(self, label: str, unit: str, done: int, total: int) -> None:
        if self._before is None or done <= self._before or label != self._counted:  # the first, perhaps of another kind
            self._began, self._before, self._counted = self._last, done - 1, label
        self._last = time.monotonic()
        count = f"{done:,} of {total:,} {unit}"
        line = f"{label}: {count}"
        if done - self._before > 1:
            left = (total - done) * (self._last - self._began) / (done - self._before)
            line += f", about {duration_text(left)} left"
        self._show(label, done, total, count, line)


class QuestionProgress(LeftProgress):
    """How many of a task's questions, or other `unit`, were read or answered."""

    def __init__(self, label: str, unit: str = "questions"):
        super().__init__(label)
        self._unit = unit

    def update(self, done: int, total: int) -> None:
        self.count(self._label, self._unit, done, total)


class PrefillProgress(ReadingProgress):
    """How many tokens of a long prompt were read; the bar goes before the answer begins."""

    def __init__(self, total: int):
        super().__init__(label="reading the prompt", shown=total > _LONG_PROMPT)

    def update(self, done: int, total: int) -> None:
        if done < total:
            super().update(done, total)
        else:
            self.close()


class ConversionProgress(LongWork):
    """Which stage a conversion is in, how far that is, and about how long the rest of it takes."""

    def __init__(self) -> None:
        super().__init__("loading")
        self._stage, self._began, self._first = "", 0.0, 0

    def update(self, now: Progress) -> None:
        from ..sizes import size_text

        count = f"{now.done:,} of {now.total:,} {now.unit}"
        if now.all_bytes:
            count += f", {size_text(now.bytes)} of {size_text(now.all_bytes)}"
        done, total = (now.bytes, now.all_bytes) if now.all_bytes else (now.done, now.total)
        if now.stage != self._stage:
            self._stage, self._began, self._first = now.stage, time.monotonic(), done
        elif self._first < done < total:
            left = (total - done) * (time.monotonic() - self._began) / (done - self._first)
            count += f", about {duration_text(left)} left"
        self._show(now.stage, done, total, count, f"{now.stage}: {count}")


class DataProgress(LongWork):
    """How far a step over files of records is, and in about what time it is done, where its length is known."""

    _SOON = 10.0  # seconds of a stage, before which its speed is a guess

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._stage, self._began, self._before = "", 0.0, 0

    def update(self, now: Advance) -> None:
        if now.stage != self._stage:
            self._stage, self._began, self._before = now.stage, time.monotonic(), now.done
        count = f"{now.records:,} records"
        took, done = time.monotonic() - self._began, now.done - self._before
        left = ""
        if took >= self._SOON and done > 0 and now.total > now.done:
            left = f", about {duration_text((now.total - now.done) * took / done)} left"
        share = f", {now.done / now.total:.0%}" if now.total else ""
        self._show(now.stage, now.done, now.total, f"{count}{left}", f"{now.stage}: {count}{share}{left}")


@contextmanager
def kept_when_stopped(output: str, method: str) -> Iterator[None]:
    """Around a conversion by some method: on Ctrl-C say where what is done is kept, if it is."""
    try:
        yield
    except KeyboardInterrupt:
        from ..conversion.unfinished import unfinished_place

        folder = unfinished_place(Path(output))
        if method != "round" and folder.exists():
            note(f"{folder} keeps what is done; the same command goes on from there")
        raise
