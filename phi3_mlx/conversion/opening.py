"""Which kind of source a path is."""

from __future__ import annotations

from pathlib import Path

from .directory import DirectorySource
from .sources import Source


def open_source(path: Path) -> Source:
    """The checkpoint in a model directory or a GGUF file; headers are read, weights are not.

    Raises CheckpointError or ConfigError for what is missing, damaged, or not a model this package can compute.
    """
    if path.is_dir():
        return DirectorySource(path)
    from .gguf.source import GgufSource

    return GgufSource(path)
