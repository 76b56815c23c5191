"""Writes safetensors shards tensor by tensor: the header first, from shapes known beforehand, then bytes as they come.

The format is `safetensors.py`'s; the shards, their names and the index are Hugging Face's and mlx-lm's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import json_text
from ..sizes import size_text
from ..store.safetensors import INDEX, Tensor
from .sources import to_mlx

_SHARD_BYTES = 5 * 10**9
_SPARE = 10**7  # bytes for what goes along with the weights


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: `done` of `total`, in `unit` ("layers", "tensors" or "tokens").

    `stage` is "measuring", "writing" or "comparing"; only writing counts bytes.
    """

    stage: str
    unit: str
    done: int
    total: int
    bytes: int = 0
    all_bytes: int = 0


def write_weights(
    directory: Path,
    tensors: Mapping[str, Tensor],
    arrays: Iterable[tuple[str, mx.array]],
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write `arrays`, which come in the order of `tensors` and are as these say, into shards of at most 5 GB.

    One array is in memory at a time, if `arrays` keeps none itself. `directory` is there, and has no weights yet.
    """
    shards = list(_shards(tensors))
    coming = iter(arrays)
    weight_map = {}
    written = count = 0
    total = sum(tensor.nbytes for tensor in tensors.values())
    if progress is not None:
        progress(Progress("writing", "tensors", 0, len(tensors), 0, total))
    for i, names in enumerate(shards):
        several = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file_name = several if len(shards) > 1 else "model.safetensors"
        with (directory / file_name).open("wb") as file:
            file.write(_header({name: tensors[name] for name in names}))
            for name in names:
                given, array = next(coming)
                planned = tensors[name]
                if (given, array.shape, array.dtype) != (name, planned.shape, to_mlx(planned.dtype)):
                    raise AssertionError(f"{given} {array.shape} {array.dtype} came where {name} {planned} was planned")
                file.write(_bytes(array))
                del array
                mx.clear_cache()
                written, count = written + planned.nbytes, count + 1
                if progress is not None:
                    progress(Progress("writing", "tensors", count, len(tensors), written, total))
        weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_space(directory: Path, needed: int) -> None:
    """CheckpointError unless the disk of `directory` has room for `needed` bytes of weights."""
    free = shutil.disk_usage(directory).free
    if free < needed + _SPARE:
        raise CheckpointError(
            f"{directory} is on a disk with {size_text(free)} free, and the model takes {size_text(needed + _SPARE)}; "
            "free some space or name a directory on another disk"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, in runs that fit a shard; a tensor larger than a shard has one to itself."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of eight, which readers may map
    return len(text).to_bytes(8, "little") + text


def _bytes(array: mx.array) -> memoryview:
    """The array's bytes in row order, without a copy where they lie so already."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8), copy=False).data
