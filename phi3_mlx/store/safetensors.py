"""The tensors in the safetensors files of a model directory, from the files' headers alone.

The format: eight bytes, little-endian, with the header's length; the header, JSON that gives every tensor a dtype,
a shape and its place in the data; the data, without holes (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..config import read_json
from ..errors import CheckpointError
from ..fields import parse, shorten
from ..files import open_file
from ..paths import PICKLES, convert_command, gguf_files

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_LONGEST_NAME = 255  # of a file, in bytes
_WIDEST = 1 << 31  # mlx's limit for each dimension of an array
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1} | {
    f"{s}{n}": n // 8 for s in "IU" for n in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk; `dtype` in the format's spelling ("BF16", "U32"), `nbytes` as stored."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """All tensors of a model directory, the file of each (`homes`), and the names of missing files (`absent`)."""

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    homes: dict[str, Path]
    absent: tuple[str, ...]


def find_weights(directory: Path) -> Weights:
    """The weights of a model directory, from the headers of the files that `weight_files` gives.

    Raises CheckpointError if there are none, if a file is damaged, or if two files hold the same tensor.
    """
    files, absent = weight_files(directory)
    if not files:
        _no_weights(directory, absent)
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in homes:
                raise CheckpointError(
                    f"{directory}: {homes[name].name} and {file.name} both hold {name}, so one of them is of other "
                    "weights; move it away"
                )
            tensors[name], homes[name] = tensor, file
    if not tensors:
        _damaged(files[0], "holds no tensors")
    return Weights(tuple(files), tensors, homes, absent)


def weight_files(directory: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files with a model directory's weights, and the names of those that belong to them and are missing.

    `model.safetensors` alone if it exists, else the files that the index names, as in transformers. An index that names
    missing files, and not those that exist, belongs to other weights: then every `model*.safetensors` counts, as in
    mlx-lm. Which tensors a file holds is read from its header, not from the index.
    """
    whole = directory / "model.safetensors"
    if whole.exists():
        return [whole], ()
    named = set(read_index(directory / INDEX).values()) if (directory / INDEX).exists() else set()
    listed = named | {path.name for path in directory.glob("model*.safetensors")}
    here = {name for name in listed if (directory / name).exists()}  # a link whose target was deleted is no file
    if not (named <= here or here <= named):
        named = set()
    wanted = named or here | {sibling for name in here for sibling in _siblings(name)}
    return [directory / name for name in sorted(wanted & here)], tuple(sorted(wanted - here))


def _siblings(name: str) -> list[str]:
    """The names of all shards of the set that one of them, `...-00001-of-00003.safetensors`, belongs to."""
    match = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\.safetensors)", name)
    return [f"{match[1]}{i:05d}-of-{match[2]}{match[3]}" for i in range(1, int(match[2]) + 1)] if match else []


def lacks(directory: Path, absent: Sequence[str]) -> str:
    """The message for a model directory that lacks some of its weights."""
    more = f" and {len(absent) - 1:,} more files" if len(absent) > 1 else ""
    return f"{directory} lacks {absent[0]}{more} of its weights; download the model again"


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises CheckpointError unless header and file agree to the byte."""
    header, length, size = _read_json_header(path)
    header.pop("__metadata__", None)
    end = 0
    tensors = {}
    placed = [(_place(path, name, entry), name, entry) for name, entry in header.items()]
    for (first, last), name, entry in sorted(placed, key=lambda item: item[0]):
        shape = tuple(entry["shape"])
        item_size = _ITEM_BYTES.get(entry["dtype"])
        if first != end or (item_size is not None and last - first != item_size * math.prod(shape)):
            _damaged(path, f"has a header whose offsets contradict each other at {shorten(name, quote=False)}")
        tensors[name] = Tensor(entry["dtype"], shape, last - first)
        end = last
    if 8 + length + end != size:
        _damaged(path, f"has {size:,} bytes where its header promises {8 + length + end:,}")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors, by name. Raises CheckpointError."""
    return _read_json_header(path)[0].get("__metadata__") or {}


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header, its length in front, of a file with these tensors in this order and these texts beside them."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of eight, which readers may map
    return len(text).to_bytes(8, "little") + text


def _read_json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it is stored, its length and the file's, in bytes. Raises CheckpointError."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > size:
                _damaged(path, f"is cut short or is no safetensors file ({size:,} bytes)")
            if length > _LONGEST_HEADER:
                _damaged(path, f"claims a header of {length:,} bytes, which is no safetensors header")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = parse(text.decode(), strict=True)  # mlx reads no NaN
    except ValueError as error:
        _damaged(path, f"has a header that is not JSON ({error})")
    if not isinstance(header, dict):
        _damaged(path, "has a header that is not a JSON object")
    metadata = header.get("__metadata__") or {}  # mlx writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _damaged(path, "has a header whose __metadata__ holds something else than texts")
    return header, length, size


def _place(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The data offsets of a header's entry, checked. Raises CheckpointError."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(fields.get("dtype"), str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or not all(type(n) is int and n >= 0 for n in shape + offsets)
        or not all(n < _WIDEST for n in shape)
        or len(offsets) != 2
    ):
        _damaged(path, f"has a header with a malformed entry, {shorten(name, quote=False)}")
    return offsets[0], offsets[1]


def read_index(path: Path) -> dict[str, str]:
    """The index of a sharded model: tensor name -> file name. Raises CheckpointError."""
    weight_map: dict[str, str] = read_json(path).get("weight_map")  # type: ignore[assignment]
    if not isinstance(weight_map, dict) or not weight_map:
        _damaged(path, "has no weight_map")
    for file_name in weight_map.values():
        # A name with a folder in it could point anywhere on this disk.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            _damaged(path, f"names {shorten(file_name)}, which is not a file beside it")
        if not file_name.endswith(".safetensors") or len(os.fsencode(file_name)) > _LONGEST_NAME:
            _damaged(path, f"names {shorten(file_name, quote=False)}, which is not a safetensors file")
    return weight_map


def _no_weights(directory: Path, absent: Sequence[str]) -> NoReturn:
    if absent:
        raise CheckpointError(lacks(directory, absent))
    gone = next((file.name for file in directory.glob("model*.safetensors")), None)
    if gone is not None:
        raise CheckpointError(f"{directory}: {gone} is a link to a file that is gone; download the model again")
    looked = f"{directory} has no weights: looked for {INDEX} and model*.safetensors"
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{looked}, and found {others[0]}; if it is the whole model, name it model.safetensors")
    ggufs = gguf_files(directory)
    if ggufs:
        raise CheckpointError(f"{looked}, and found {ggufs[0].name}; type `{convert_command(ggufs[0])}`")
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickle weights ({pickles[0]}), and pickle is never read because loading it runs "
            "whatever code it holds; get the model.safetensors of the same model"
        )
    raise CheckpointError(f"{looked}; download the model again")


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path} {why}; download it again")
