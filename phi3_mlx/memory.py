"""What a run does to the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

# Buffers MLX may keep for reuse. Left alone it keeps as much as the memory limit allows, and a Mac swaps.
_BUFFER_CACHE = 1 << 30


@contextmanager
def bounded_run() -> Iterator[None]:
    """For the time of a run: weights wired on Metal (macOS would page them out), MLX's buffer cache bounded."""
    wired = mx.metal.is_available()
    cache_limit = mx.set_cache_limit(_BUFFER_CACHE)
    if wired:
        wired_limit = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.set_cache_limit(cache_limit)
        if wired:
            mx.synchronize()
            mx.set_wired_limit(wired_limit)
