"""The GGUF container: metadata, the list of tensors, and their values one by one.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts; the metadata, each entry a name, a type
and a value; for each tensor its name, dimensions (fastest first), type and offset; then, aligned, the values. The
`gguf` library knows the types and dequantizes them. Its own reader makes several array objects of every token of the
vocabulary (half a minute and a gigabyte for 50,000 of them), so the header is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...fields import shorten
from ...files import open_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Of a model in several files.
_SPLIT_NUMBER, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Types whose blocks mlx has too, as affine groups of 32, by their bits.
BLOCKS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_CHUNK_BYTES = 1 << 20  # dequantized at a time: what fits a processor's cache is fastest


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: `type` in the format's spelling ("Q4_K"), `shape` rows first, `offset` in the file `path`."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    @property
    def dtype(self) -> str:
        """The floating type that holds its values exactly, in the spelling of safetensors."""
        return self.type if self.type in _FLOAT_TYPES else "F32"


class GgufFile:
    """A GGUF file's `metadata` (plain Python values) and `tensors`.

    `path` may be the first of several parts, whose tensors are those of all. CheckpointError where one is damaged or
    missing.
    """

    def __init__(self, path: Path):
        self.path = path
        header = self._header(path)
        self.metadata, self.tensors = header.metadata, dict(header.tensors)
        count = self.metadata.get(_SPLIT_COUNT, 0)
        if count in (0, 1):
            return
        ending = f"-00001-of-{count:05}.gguf" if isinstance(count, int) else ""
        if self.metadata.get(_SPLIT_NUMBER) != 0 or not ending or not path.name.endswith(ending):
            self.fail(f"is one of {count!r} parts; name the first, whose name ends in -00001-of-NNNNN.gguf")
        for number in range(1, count):
            part = path.with_name(f"{path.name.removesuffix(ending)}-{number + 1:05}-of-{count:05}.gguf")
            other = self._header(part)
            if (other.metadata.get(_SPLIT_NUMBER), other.metadata.get(_SPLIT_COUNT)) != (number, count):
                self.fail(f"is the first of {count} parts, and {part.name} is no part of it; download them again")
            if twice := self.tensors.keys() & other.tensors.keys():
                self.fail(f"has {min(twice)} in two of its parts; download them again")
            self.tensors |= other.tensors
        if self.metadata.get(_SPLIT_TENSORS, len(self.tensors)) != len(self.tensors):
            self.fail(
                f"should have {self.metadata[_SPLIT_TENSORS]} tensors in its parts, which have {len(self.tensors)}"
            )

    def _header(self, path: Path) -> _Header:
        try:
            with open_file(path) as file:
                if path.stat().st_size < 24:
                    raise CheckpointError(f"{path} is cut short or is no GGUF file")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Header(path, data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {why}")

    def read(self, name: str, order: np.ndarray | None = None) -> mx.array:
        """The values of a tensor: float32, float16 or bfloat16 as stored, float32 where they are packed in blocks.

        `order` (rows,) asks for its rows in another order. In memory at once: the result, and a few megabytes.
        """
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.nbytes // rows
        step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
        if order is not None:  # such tensors are small: all of it
            stored = self._bytes(tensor, 0, rows, row_bytes)[order]
        whole = mx.zeros((rows, tensor.shape[-1]), _MLX[tensor.dtype])
        for first in range(0, rows, step):
            last = min(first + step, rows)
            chunk = self._bytes(tensor, first, last, row_bytes) if order is None else stored[first:last]
            whole[first:last] = self._values(tensor, chunk)
            mx.eval(whole)  # written in place: nothing else holds it
        return whole.reshape(tensor.shape)

    def read_blocks(self, name: str, order: np.ndarray | None = None) -> list[mx.array]:
        """A tensor of a type in `BLOCKS` as mlx packs it: weight uint32, scales and biases float16; nothing is rounded.

        Blocks are of 32 values: Q4_0's are scale * (q - 8), Q4_1's scale * q + minimum, Q8_0's scale * q with q from
        -128 to 127. mlx's are scale * q + bias with q from 0; its 4-bit values stand in the order of the row, while a
        block has its first 16 in the low halves of its bytes and its last 16 in the high ones.
        """
        tensor = self.tensors[name]
        *outer, width = tensor.shape
        rows = math.prod(outer)
        size = tensor.nbytes // (rows * (width // 32))
        blocks = self._bytes(tensor, 0, rows, tensor.nbytes // rows)
        blocks = (blocks if order is None else blocks[order]).reshape(rows, width // 32, size)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0]
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale: whoever checks for NaN will name it
            if tensor.type == "Q8_0":
                weight, biases = blocks[..., 2:] ^ 0x80, scales * np.float16(-128)
            else:
                low, high = blocks[..., -16:] & 15, blocks[..., -16:] >> 4
                values = np.concatenate([low, high], axis=-1)
                weight = values[..., 0::2] | values[..., 1::2] << 4
                biases = scales * np.float16(-8)
                if tensor.type == "Q4_1":
                    biases = blocks[..., 2:4].copy().view(np.float16)[..., 0]
        packed = np.ascontiguousarray(weight).reshape(rows, -1).view(np.uint32)
        return [mx.array(array).reshape(*outer, -1) for array in (packed, scales, biases)]

    def _bytes(self, tensor: GgufTensor, first: int, last: int, row_bytes: int) -> np.ndarray:
        count, offset = (last - first) * row_bytes, tensor.offset + first * row_bytes
        return np.fromfile(tensor.path, np.uint8, count, offset=offset).reshape(last - first, row_bytes)

    def _values(self, tensor: GgufTensor, rows: np.ndarray) -> mx.array:
        if tensor.type in _FLOAT_TYPES:
            values = mx.array(rows.view(_FLOAT_TYPES[tensor.type]))
            return values.view(mx.bfloat16) if tensor.type == "BF16" else values
        gguf = library(self.path)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale: whoever checks for NaN will name it
            # As one row, because the library takes 16 rows at a time, however short.
            values = gguf.dequantize(rows.reshape(1, -1), gguf.GGMLQuantizationType[tensor.type])
        return mx.array(values.reshape(len(rows), -1))


class _Header:
    """One pass over a file's header."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0
        if self.take(4) != _MAGIC:
            self.fail("is no GGUF file (it does not begin with GGUF)")
        version = self.scalar("I")
        if version not in _VERSIONS:
            kind = "is big-endian" if version & 0xFFFF == 0 else f"is of version {version}"
            self.fail(f"{kind}; this package reads little-endian GGUF of versions 2 and 3")
        tensor_count, entry_count = self.scalar("Q"), self.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            name = self.string()
            self.metadata[name] = self.value(self.scalar("I"))
        self.kinds: dict[int, tuple[str, int, int]] = {}
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            self.damaged(f"general.alignment is {alignment!r}")
        self.begin = -(-self.position // alignment) * alignment
        self.tensors = {name: self.place(name, shape, kind, offset) for name, shape, kind, offset in entries}

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {why}")

    def damaged(self, why: str) -> NoReturn:
        self.fail(f"is damaged ({shorten(why, quote=False)}); download it again")

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            self.damaged(f"it ends at byte {len(self.data):,}, within its header")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = int.from_bytes(self.take(8), "little")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                code = np.dtype(_SCALARS[inner]).newbyteorder("<")
                return np.frombuffer(self.take(count * code.itemsize), code).tolist()
            if inner == _ARRAY:
                self.damaged("an array within an array, which no model's metadata has")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            self.damaged(f"unknown metadata type {kind}")
        return self.scalar(_SCALARS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.scalar("I")
        if not 1 <= dimensions <= 4:
            self.damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        if not all(shape):
            self.damaged(f"{name} has the shape {shape}")
        return name, shape, self.scalar("I"), self.scalar("Q")

    def place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        if number not in self.kinds:
            self.kinds[number] = self.kind(name, number)
        kind, block, block_bytes = self.kinds[number]
        if shape[-1] % block:
            self.damaged(f"the rows of {name}, {shape[-1]} long, are no whole blocks of {kind}")
        nbytes = math.prod(shape) // block * block_bytes
        if self.begin + offset + nbytes > len(self.data):
            self.damaged(f"it ends at byte {len(self.data):,}, {name} at {self.begin + offset + nbytes:,}")
        return GgufTensor(kind, shape, self.begin + offset, nbytes, self.path)

    def kind(self, name: str, number: int) -> tuple[str, int, int]:
        """Name of a tensor type, how many values a block of it has, and how many bytes."""
        gguf = library(self.path)
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            self.fail(f"stores {name} in the type {number}, which the installed gguf library does not know")
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in _FLOAT_TYPES:
            try:
                gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                self.fail(
                    f"stores {name} in the type {kind.name}, which the gguf library cannot dequantize; use another file"
                )
        return kind.name, block, block_bytes


def library(path: Path) -> ModuleType:
    """The `gguf` library, which `path` needs. CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f'{path} needs the gguf library, which is not installed: pip install "phi3-mlx[gguf]"'
        ) from None
    return gguf
