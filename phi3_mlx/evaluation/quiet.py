"""Libraries that say nothing of what goes on: what ends a run is said in one line, by the error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """For this block, of these libraries' logs only errors."""
    logs = [logging.getLogger(name) for name in libraries]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
