"""A model directory as the sink of a conversion: safetensors shards, each header first, then bytes as they come.

The format is `safetensors.py`'s; the shards, their names and the index are Hugging Face's and mlx-lm's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import json_text
from ..sizes import size_text
from ..store.safetensors import INDEX, Tensor, header_of
from .layout import Layout, Rounder
from .sinks import Progress
from .sources import Source, to_mlx

_SHARD_BYTES = 5 * 10**9
_SPARE = 10**7  # bytes for what goes along with the weights


class DirectorySink:
    """A model directory, which is there and has no weights yet; shards take at most 5 GB.

    `destination`: where it will be moved when it is complete; messages name the place.
    """

    def __init__(self, directory: Path, destination: Path | None = None):
        self._directory = directory
        self._place = directory if destination is None else Path(os.path.realpath(destination)).parent

    def check_space(self, nbytes: int, beside: int = 0) -> None:
        """`beside`: bytes of what is kept beside the model until that is complete."""
        free, needed = shutil.disk_usage(self._place).free, nbytes + beside + _SPARE
        if free < needed:
            meanwhile = f", {size_text(beside)} of it until it is complete" if beside else ""
            raise CheckpointError(
                f"{self._place} is on a disk with {size_text(free)} free, and the model takes {size_text(needed)}"
                f"{meanwhile}; free some space or name a directory on another disk"
            )

    def write_extras(self, source: Source) -> None:
        source.write_extras(self._directory)

    def write(self, layout: Layout, arrays: Rounder, progress: Callable[[Progress], None] | None = None) -> None:
        shards = list(_shards(layout.stored))
        coming = _one_by_one(layout, arrays)
        weight_map = {}
        written = count = 0
        total = layout.nbytes
        if progress is not None:
            progress(Progress("writing", "tensors", 0, len(layout.stored), 0, total))
        for i, tensors in enumerate(shards):
            several = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            file_name = several if len(shards) > 1 else "model.safetensors"
            with (self._directory / file_name).open("wb") as file:
                file.write(header_of(tensors, {"format": "mlx"}))
                for name, tensor in tensors.items():
                    array = next(coming)
                    if (array.shape, array.dtype) != (tensor.shape, to_mlx(tensor.dtype)):
                        raise AssertionError(f"{name} is {array.shape} {array.dtype}, and the header says {tensor}")
                    file.write(_bytes(array))
                    del array
                    mx.clear_cache()
                    written, count = written + tensor.nbytes, count + 1
                    if progress is not None:
                        progress(Progress("writing", "tensors", count, len(layout.stored), written, total))
            weight_map.update(dict.fromkeys(tensors, file_name))
        if len(shards) > 1:
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_config(self, config: Mapping[str, Any], layout: Layout) -> None:
        # Twice because tools of the Hugging Face hub look for the second name.
        names = () if layout.recipe is None else ("quantization", "quantization_config")
        write_json(self._directory / "config.json", {**config, **dict.fromkeys(names, layout.recipe)})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def _one_by_one(layout: Layout, arrays: Rounder) -> Iterator[mx.array]:
    """The arrays of all entries; none is kept here once the next is asked for."""
    for entry in layout.entries:
        parts = arrays(entry)
        while parts:
            yield parts.pop(0)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, in runs that fit a shard; one larger than a shard has one to itself."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _bytes(array: mx.array) -> memoryview:
    """The array's bytes in row order, without a copy where they lie so already."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8), copy=False).data
