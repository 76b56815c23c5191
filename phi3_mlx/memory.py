"""What a run does to the machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

# Buffers MLX may keep for reuse. Left alone it keeps as much as the memory limit allows, and a Mac swaps.
_BUFFER_CACHE = 1 << 30


_runs = 0
_restore: list[Callable[[], object]] = []


@contextmanager
def bounded_run() -> Iterator[None]:
    """For the time of a run: weights wired on Metal (macOS would page them out), MLX's buffer cache bounded.

    Runs may overlap (two streams read in turn): the first sets the limits, the last to end restores them.
    """
    global _runs
    _runs += 1
    try:
        if _runs == 1:
            _set_limits()
        yield
    finally:
        _runs -= 1
        if _runs == 0:
            while _restore:
                _restore.pop()()


def _set_limits() -> None:
    cache_limit = mx.set_cache_limit(_BUFFER_CACHE)
    _restore.append(lambda: mx.set_cache_limit(cache_limit))
    # A Mac whose default device was set to the CPU has Metal, but runs nothing on it.
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        wired_limit = mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))
        _restore.append(lambda: mx.set_wired_limit(wired_limit))
        _restore.append(mx.synchronize)
