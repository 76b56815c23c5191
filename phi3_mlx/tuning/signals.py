"""Signals that end a run: it saves first. Ctrl-C, SIGTERM (kill, a shutdown), SIGHUP (the terminal was closed)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """The signal that asks a run to stop, if one came."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def is_set(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Notes signals for the time of the block; a second Ctrl-C raises KeyboardInterrupt at once.

    What is ignored stays so (`nohup`, and Ctrl-C for what a script runs in the background). In threads other than the
    main one nothing is noted: Python lets these handle no signals.
    """
    stop = Stop()

    def note(number: int, _: Any) -> None:
        if number != signal.SIGINT:
            stop.signal = number
        elif stop.is_set():
            raise KeyboardInterrupt
        else:
            stop.signal = number

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_on(number: int | None) -> None:
    """Let a signal do what it would have done, now that all is saved; Ctrl-C asked for no more than that."""
    if number is not None and number != signal.SIGINT:
        signal.raise_signal(number)
