"""Steering vectors as files: safetensors, and llama.cpp's control vectors in GGUF (`llama-cli --control-vector`).

Either way the vector of layer N, counted from 0, is a tensor `direction.N` (hidden_size,), which is added to what that
layer gives. llama.cpp has none for layer 0. Source: llama.cpp, tools/cvector-generator and src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import mlx.core as mx
import numpy as np

from .. import values
from ..errors import CheckpointError, OptionError
from ..fields import shorten
from ..paths import expanded
from ..store.atomic import check_file, new_file
from ..store.checkpoint import read_arrays
from ..store.safetensors import read_header, read_metadata
from ..threads import refuse_fork
from .gguf.file import GgufFile, library
from .gguf.sink import GgufEntry, GgufSink

if TYPE_CHECKING:
    from ..config import Config
    from ..models.decoder import Model

_ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,5})")


def save_steering(
    vectors: Mapping[int, mx.array], path: str | Path, *, model_type: str = "phi3", force: bool = False
) -> Path:
    """Write `vectors`, (hidden_size,) each by layer from 0, to a .safetensors or .gguf file; returns its path.

    `model_type` is that of their model (`controlvector.model_hint`). `force` replaces a file that is there. Raises
    OptionError for vectors that are none or, in GGUF, of layer 0; CheckpointError, OSError.
    """
    refuse_fork()
    destination = expanded(values.path(path, "path"))
    model_type, force = values.text(model_type, "model_type"), values.flag(force, "force")
    arrays = _checked(vectors)
    if destination.suffix not in (".gguf", ".safetensors"):
        raise OptionError(
            f"path {str(destination)!r} ends in neither .safetensors nor .gguf, which say what is written"
        )
    if destination.suffix == ".gguf" and 0 in arrays:
        raise OptionError(
            "vectors has one of layer 0, for which llama.cpp has no place; leave it out, or write safetensors"
        )
    check_file(destination)
    if destination.exists() and not force:
        raise CheckpointError(f"{destination} exists already; name another file, or replace it with force=True")
    tensors = {f"direction.{layer}": array for layer, array in sorted(arrays.items())}
    if destination.suffix == ".gguf":
        _write_gguf(destination, tensors, model_type)
    else:
        with new_file(destination) as file:
            mx.save_safetensors(file, {name: mx.array(array) for name, array in tensors.items()}, {"model": model_type})
    return destination.absolute()


def load_steering(path: str | Path, model: Model | None = None) -> dict[int, mx.array]:
    """The vectors of a file of `save_steering` or llama.cpp's, (hidden_size,) float32 each by layer from 0.

    Raises CheckpointError for a file that is damaged or none of steering vectors, and OptionError if they are not
    `model`'s: of another width, of layers that it has not, or of another type of model.
    """
    if model is not None and not getattr(model, "of_family", False):
        raise OptionError(f"model is {values.shown(model)}; expected one of the Phi family, as load() gives it")
    return read_steering(path, None if model is None else model.config)


def read_steering(path: str | Path, config: Config | None = None) -> dict[int, mx.array]:
    """`load_steering` for a model with this config."""
    file = expanded(values.path(path, "path"))
    if file.suffix == ".gguf":
        opened = GgufFile(file)
        if opened.metadata.get("general.architecture") != _ARCHITECTURE:
            _refuse(file, f"its architecture is {opened.metadata.get('general.architecture')!r}")
        hint = opened.metadata.get(f"{_ARCHITECTURE}.model_hint")
        shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
        read = {name: opened.read(name) for name in _named(file, shapes)}
    else:
        shapes = {name: tensor.shape for name, tensor in read_header(file).items()}
        names = _named(file, shapes)
        loaded, hint = read_arrays(file), read_metadata(file).get("model")
        read = {name: loaded[name] for name in names}
    vectors = {int(name.rpartition(".")[2]): array.astype(mx.float32) for name, array in read.items()}
    if not all(bool(mx.isfinite(vector).all()) for vector in vectors.values()):
        raise CheckpointError(f"{file} has values that are not finite (NaN or infinity); make it again")
    if config is not None:
        _check_model(file, vectors, hint, config)
    return vectors


def _check_model(file: Path, vectors: Mapping[int, mx.array], hint: object, config: Config) -> None:
    """OptionError unless vectors are of a model with this config."""
    width, last = next(iter(vectors.values())).size, max(vectors)
    if hint and hint != config.model_type:
        _refuse_model(file, f"it names {shorten(hint)} as their type", f"is {config.model_type}")
    if width != config.hidden_size:
        _refuse_model(file, f"they have {width:,} numbers", f"has {config.hidden_size:,}")
    if last >= config.num_hidden_layers:
        _refuse_model(file, f"one is of layer {last}", f"has layers 0 to {config.num_hidden_layers - 1}")


def _refuse_model(file: Path, theirs: str, ours: str) -> NoReturn:
    raise OptionError(f"{file} has steering vectors of another model: {theirs}, and this one {ours}")


def _checked(vectors: Mapping[int, mx.array]) -> dict[int, np.ndarray]:
    if not isinstance(vectors, Mapping) or not vectors:
        raise OptionError("vectors is no dictionary of vectors by layer, such as {12: vector}")
    arrays = {}
    for layer, vector in vectors.items():
        if type(layer) is not int or layer < 0:
            raise OptionError(f"vectors has the layer {layer!r}, expected a whole number from 0")
        try:
            arrays[layer] = np.array(mx.array(vector).astype(mx.float32))
        except (TypeError, ValueError) as error:
            raise OptionError(f"vectors has no array for layer {layer}") from error
        if arrays[layer].ndim != 1 or not arrays[layer].size or not np.isfinite(arrays[layer]).all():
            raise OptionError(
                f"vectors has {arrays[layer].shape} for layer {layer}, expected finite numbers (hidden_size,)"
            )
    if len({array.shape for array in arrays.values()}) > 1:
        raise OptionError("vectors has vectors of different lengths; they are of different models")
    return arrays


def _write_gguf(destination: Path, tensors: Mapping[str, np.ndarray], model_type: str) -> None:
    metadata = {
        "general.type": _ARCHITECTURE,
        f"{_ARCHITECTURE}.model_hint": model_type,
        f"{_ARCHITECTURE}.layer_count": len(tensors),
    }
    entries = [GgufEntry(name, array.shape, "F32", array.nbytes) for name, array in tensors.items()]

    def encode(entry: GgufEntry) -> Iterator[np.ndarray]:
        yield tensors[entry.name]

    GgufSink(library(destination), destination).write(_ARCHITECTURE, metadata, entries, encode)


def _named(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The names of all tensors, which are vectors of one length and their layers."""
    if not shapes or not all(_DIRECTION.fullmatch(name) for name in shapes):
        _refuse(
            file, f"it has {min((name for name in shapes if not _DIRECTION.fullmatch(name)), default='no tensors')}"
        )
    if len({*shapes.values()}) > 1 or len(next(iter(shapes.values()))) != 1:
        _refuse(file, "its tensors are no vectors of one length")
    return {*shapes}


def _refuse(file: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{file} holds no steering vectors (direction.N of each layer): {why}")
