"""Threads take turns at computing, a forked process is refused, and Python ends after the threads that have computed.

A lazy array of MLX can only be computed in the thread that made it, so whatever is kept from one step to the next is
computed in the step's own turn, or queued in it. Then any thread may take the next one.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .errors import Phi3Error

_computing, _next = threading.Lock(), threading.Lock()
_computes = 0  # the thread whose turn it is
_have_computed: set[int] = set()  # threads, by the number that the system gave them
_forked = False


@contextmanager
def turn() -> Iterator[None]:
    """For the time of a step: what other threads want to compute waits, so that no two steps' workspaces add up.

    Never hold it while a caller's code runs. Raises Phi3Error in a forked process.
    """
    global _computes
    refuse_fork()
    if _computes == threading.get_ident():
        yield
        return
    # Whoever waits holds `_next`, so the thread that lets go cannot take the next turn as well.
    with _next:
        _computing.acquire()
    _computes = threading.get_ident()
    try:
        yield
    finally:
        _computes = 0
        _computing.release()


def refuse_fork() -> None:
    """Raise Phi3Error in a process that was forked from one in which MLX had begun to compute: it would hang.

    Whoever asks computes next, so Python waits for this thread, too, before it ends.
    """
    _have_computed.add(threading.get_native_id())
    if _forked:
        raise Phi3Error(
            "this process was forked from one that had used MLX, which does not survive that; start processes with "
            'multiprocessing.get_context("spawn"), or load the model in the new process alone'
        )


def _after_fork() -> None:
    global _forked
    _forked = any((mx.get_peak_memory(), mx.get_active_memory(), mx.get_cache_memory()))


def _wait_for_ended_threads() -> None:
    """Let threads end for the system that have ended for Python; called before Python itself ends.

    A thread that ends makes MLX forget what was compiled in it, Python's objects among that. Python aborts the process
    if it has ended by then. `Thread.join` waits that long only since Python 3.13.
    """
    ended = _have_computed - {thread.native_id for thread in threading.enumerate()}
    tasks, deadline = Path("/proc/self/task"), time.monotonic() + 1
    if not tasks.is_dir():
        time.sleep(0.1 if ended else 0)  # macOS does not tell; it takes far less than a millisecond
        return
    while time.monotonic() < deadline and any((tasks / str(number)).exists() for number in ended):
        time.sleep(0.001)


atexit.register(_wait_for_ended_threads)
os.register_at_fork(after_in_child=_after_fork)
