"""How much memory this machine has for a run, and what a run does to MLX's limits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..models.attention import fused_attention
from ..sizes import parse_size

MEMINFO, CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

# Buffers MLX may keep for reuse. Left alone it keeps as much as the memory limit allows, and a Mac swaps.
_BUFFER_CACHE = 1 << 30


_runs: set[object] = set()
_restore: list[Callable[[], object]] = []
os.register_at_fork(after_in_child=_restore.clear)  # MLX hangs there, even where a stream is only forgotten
_allowed: list[int] = []


@contextmanager
def bounded_run(spare: float = math.inf) -> Iterator[None]:
    """For the time of a run: weights wired on Metal (macOS would page them out), MLX's buffer cache bounded.

    `spare`: bytes that the run's plan leaves of its room, which the buffers kept must not exceed. Runs may overlap (two
    streams read in turn): the first sets the limits, the last to end restores them. Any thread may end one, at any
    time: Python closes a stream nobody reads on wherever it finds it. So there is no lock here, and no counting.
    """
    run = object()
    _runs.add(run)
    try:
        if not _restore:
            _set_limits(int(min(_BUFFER_CACHE, max(spare, 0))))
        yield
    finally:
        _runs.discard(run)
        if not _runs:
            while _restore:
                _restore.pop()()


def _set_limits(buffers: int) -> None:
    cache_limit = mx.set_cache_limit(buffers)
    _restore.append(lambda: mx.set_cache_limit(cache_limit))
    # A Mac whose default device was set to the CPU has Metal, but runs nothing on it.
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        wired_limit = mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))
        _restore.append(lambda: mx.set_wired_limit(wired_limit))
        _restore.append(mx.synchronize)


@contextmanager
def memory_limit(size: int | str) -> Iterator[None]:
    """Runs inside keep what MLX holds, weights included, within `size` ("16GB"), and within the machine's.

        with memory_limit("12GB"):
            model, tokenizer = load("phi-3.5-mini-4bit")
            print(generate(model, tokenizer, prompt))  # MemoryLimitError if it does not fit

    Raises OptionError for a size that is none.
    """
    limit = parse_size(size)
    _allowed.append(limit)
    try:
        yield
    finally:
        _allowed.remove(limit)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def room() -> int:
    """Bytes that may still be allocated: of Metal's recommended working set, of a GPU's memory, else of free RAM."""
    return min([_of_machine(), *(size - mx.get_active_memory() for size in _allowed)])


def _of_machine() -> int:
    if fused_attention():
        info = mx.device_info(mx.gpu)
        for key in ("max_recommended_working_set_size", "total_memory"):  # Metal's name, CUDA's
            if info.get(key):
                return int(info[key]) - mx.get_active_memory()
    return available_ram() + mx.get_cache_memory()


def available_ram() -> int:
    """What the system would give without swapping, within the limit of this process's control group."""
    if not MEMINFO.is_file():  # macOS, computing on the CPU
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    match = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    available = int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (CONTROL_GROUP / "memory.max").read_text().strip(), (CONTROL_GROUP / "memory.current").read_text()
        if limit != "max":
            # Pages of files count as used, and are given up when somebody needs them.
            stat = CONTROL_GROUP / "memory.stat"
            files = re.search(r"^inactive_file (\d+)$", stat.read_text(), re.MULTILINE) if stat.is_file() else None
            available = min(available, int(limit) - int(used) + (int(files[1]) if files else 0))
    except (OSError, ValueError):
        pass  # no control group, or an older kind
    return available


def mac_working_set(memory: int) -> int:
    """Metal's recommended working set of a Mac with `memory` bytes: two thirds, above 32 GB three quarters.

    As `max_recommended_working_set_size` reports it on M1 to M4; a system setting can change it.
    """
    return memory * 3 // 4 if memory > 32 * 2**30 else memory * 2 // 3
