"""What a run does to the machine's memory, and how much there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


def available_memory() -> int:
    """Bytes that a run may use here: what Metal recommends, a GPU's memory, else what Linux calls available."""
    device = mx.default_device()
    if device.type == mx.DeviceType.gpu:
        info = mx.device_info(device)
        for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if info.get(key):
                return int(info[key])
    if sys.platform.startswith("linux"):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
