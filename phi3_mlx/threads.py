"""Threads take turns at computing, and a forked process is refused.

A lazy array of MLX can only be computed in the thread that made it, so whatever is kept from one step to the next is
computed in the step's own turn, or queued in it. Then any thread may take the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .errors import Phi3Error

_computing, _next = threading.Lock(), threading.Lock()
_computes = 0  # the thread whose turn it is
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
    """Raise Phi3Error in a process that was forked from one in which MLX had begun to compute: it would hang."""
    if _forked:
        raise Phi3Error(
            "this process was forked from one that had used MLX, which does not survive that; start processes with "
            'multiprocessing.get_context("spawn"), or load the model in the new process alone'
        )


def _after_fork() -> None:
    global _forked
    _forked = any((mx.get_peak_memory(), mx.get_active_memory(), mx.get_cache_memory()))


os.register_at_fork(after_in_child=_after_fork)
