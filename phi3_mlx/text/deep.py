"""Calls with room for deep recursion: where a stack ends in native code, so does the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Returned = TypeVar("Returned")
_DEEP_STACK = 512 << 20  # of addresses; memory is only taken for what is used
_starting = threading.Lock()


def call_deep(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """What `function` gives, or raises, in a thread of its own with a stack of half a gigabyte."""
    made: list[Returned] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(function(*arguments))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="phi3-mlx deep call", daemon=True)
    with _starting:  # the size is of all threads that are started
        before = threading.stack_size(_DEEP_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if raised:
        raise raised[0]
    return made[0]
