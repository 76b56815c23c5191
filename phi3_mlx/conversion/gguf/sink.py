"""A GGUF file, or its parts, as the sink of an export: header first, then each tensor's bytes as they come."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from ...errors import CheckpointError
from ...sizes import size_text
from ...store.atomic import new_files
from ..sinks import Progress

_PADDING = 10**7  # bytes for names and padding


@dataclass(frozen=True)
class GgufEntry:
    """A tensor to write: llama.cpp's `name`, its `shape` (rows first), and its type in the format's spelling.

    `source` is the name of the model's tensor that it is made of; None for one that a checkpoint does not have.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    source: str | None = None


# Gives the bytes of an entry in pieces; it is asked once for each, in order, and keeps none.
Encoder = Callable[[GgufEntry], Iterator[np.ndarray]]


class GgufSink:
    """Where a model goes: the file `output`, or with `split_bytes` files of at most that many bytes of tensors.

    `gguf` is the library.
    """

    def __init__(self, gguf: ModuleType, output: Path, split_bytes: int | None = None):
        self._gguf, self._split_bytes = gguf, split_bytes
        self._output = Path(os.path.realpath(output))

    def check_space(self, nbytes: int) -> None:
        """CheckpointError unless the disk has room for that many bytes of tensors, and for metadata."""
        place = next(folder for folder in self._output.parents if folder.exists())
        free, needed = shutil.disk_usage(place).free, nbytes + _PADDING
        if free < needed:
            raise CheckpointError(
                f"{place} is on a disk with {size_text(free)} free, and the file takes {size_text(needed)}; free some "
                "space, name a place on another disk, or take a smaller type"
            )

    def write(
        self,
        architecture: str,
        metadata: Mapping[str, Any],
        entries: Sequence[GgufEntry],
        encoder: Encoder,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Path]:
        """Write all of it; takes the memory of one piece. The files, which appear once they are complete."""
        total = sum(entry.nbytes for entry in entries)
        self.check_space(total)
        writer = self._gguf.GGUFWriter(None, architecture, split_max_size=self._split_bytes or 0)
        for key, value in metadata.items():
            _add(writer, key, value)
        for entry in entries:
            kind = self._gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        files = writer.format_shard_names(self._output)
        with new_files(self._output.parent, last=files[0].name) as folder:  # the one that is opened
            try:
                writer.write_header_to_file(folder / self._output.name)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                self._write_tensors(writer, entries, encoder, progress or (lambda _: None))
            finally:
                writer.close()
        return [Path(file) for file in files]

    def _write_tensors(
        self, writer: Any, entries: Sequence[GgufEntry], encoder: Encoder, progress: Callable[[Progress], None]
    ) -> None:
        total, written = sum(entry.nbytes for entry in entries), 0
        for count, entry in enumerate(entries):
            progress(Progress("writing", "tensors", count, len(entries), written, total))
            writer.write_tensor_data(_Streamed(entry, encoder(entry)))
            written += entry.nbytes
        progress(Progress("writing", "tensors", len(entries), len(entries), total, total))


class _Streamed:
    """What the library's writer takes for an array: it knows its size, and writes itself."""

    def __init__(self, entry: GgufEntry, pieces: Iterator[np.ndarray]):
        self.nbytes, self._entry, self._pieces = entry.nbytes, entry, pieces

    def tofile(self, file: BinaryIO) -> None:
        written = 0
        for piece in self._pieces:
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            written += piece.nbytes
        if written != self.nbytes:
            raise AssertionError(f"{self._entry} took {written} bytes")


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def nbytes_of(gguf: ModuleType, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of the type `kind`."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * block_bytes
