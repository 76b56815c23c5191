"""A model directory: checked against its config, and read into a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import mlx.core as mx

from ..config import Config
from ..errors import CheckpointError
from ..models import build, check_layers, read_config, shapes
from ..models.decoder import LongRopeRule, Model
from ..option import DTYPE_NAMES
from ..threads import refuse_fork
from ..values import choice
from .assembly import View, assemble, view
from .quantization import FLOATS, pack_like, packed_layout
from .safetensors import Tensor, Weights, find_weights, lacks

DTYPES = {name: getattr(mx, name) for name in DTYPE_NAMES}
_STORED_AS = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}  # as safetensors spells them
_LISTED = 20  # mismatches shown; a wrong config makes hundreds


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose weights fit its config, as its headers say: they are read once, by `open_checkpoint`.

    `needed` names the tensors that the model has.
    """

    directory: Path
    config: Config
    weights: Weights
    view: View
    needed: tuple[str, ...]


def read_model(source: Path | Checkpoint, *, dtype: str | None = None, longrope: LongRopeRule = "auto") -> Model:
    """The model of a directory in Hugging Face's or MLX's format, its weights in memory, in eval mode.

    Floating weights (scales and biases of packed layers too) take `dtype`: "float32", "bfloat16" or "float16".
    By default that is the checkpoint's own on a GPU, and float32 on MLX's CPU backend, which is many times slower
    in 16 bits. `longrope` pins the regime of LongRoPE models ("short", "long"); "auto" follows the length.

    Names, shapes and types are checked before a weight is read. Raises CheckpointError (files, or weights that do
    not fit the config: all of them listed), ConfigError (config.json), OptionError; Phi3Error in a forked process.
    """
    if dtype is not None:
        choice(dtype, "dtype", DTYPES)
    choice(longrope, "longrope", get_args(LongRopeRule))
    refuse_fork()
    checkpoint = open_checkpoint(source)
    model = _built(checkpoint)
    _read(checkpoint, model, target_dtype(dtype))
    model.model.longrope = longrope
    model.eval()
    return model


def outline(source: Path | Checkpoint) -> Model:
    """The model of `read_model` with random weights that are not computed: for its modules and their shapes."""
    model = _built(open_checkpoint(source))
    model.eval()
    return model


def _built(checkpoint: Checkpoint) -> Model:
    config, where = checkpoint.config, str(checkpoint.directory / "config.json")
    model = build(config)
    if config.quantization is not None:
        pack_like(model, config.quantization, checkpoint.view.tensors, where)
    return model


def read_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file that `read_header` has checked; values are read when they are evaluated.

    Raises CheckpointError for what mlx cannot read, such as a type of numbers that it does not have.
    """
    try:
        arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())}); download it again") from error
    return arrays


def read_array(weights: Weights, name: str) -> mx.array:
    """One tensor of a model directory, as it is stored; read when it is evaluated."""
    # The file is opened each time: arrays kept from an earlier call would keep their memory.
    return read_arrays(weights.homes[name])[name]


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a model depends on, from the headers of its directory."""

    config: Config
    weights: int  # bytes in memory
    largest_cast: int  # bytes of the largest stored tensor that is cast, which `read_model` holds in both types
    itemsize: int  # bytes of a number in computation
    numbers: int  # how many are stored


def model_size(source: Path | Checkpoint, dtype: str | None = None) -> ModelSize:
    """The size of the model that `read_model` would read with this dtype.

    Raises what `read_model` does for a directory that it would not read.
    """
    target, checkpoint = target_dtype(dtype), open_checkpoint(source)
    stored = checkpoint.weights.tensors.values()
    cast = set() if target is None else {*FLOATS} - {_STORED_AS[target]}
    return ModelSize(
        checkpoint.config,
        sum(
            math.prod(tensor.shape) * target.size if target and tensor.dtype in FLOATS else tensor.nbytes
            for tensor in (checkpoint.view.tensors[name] for name in checkpoint.needed)
        ),
        max((tensor.nbytes for tensor in stored if tensor.dtype in cast), default=0),
        target.size if target else 4 if checkpoint.config.dtype == "float32" else 2,
        sum(math.prod(tensor.shape) for tensor in stored),
    )


def target_dtype(dtype: str | None) -> mx.Dtype | None:
    """The dtype of floating weights in memory; None is the checkpoint's own."""
    if dtype is not None:
        return DTYPES[choice(dtype, "dtype", DTYPES)]
    return None if mx.default_device() == mx.gpu else mx.float32


def open_checkpoint(source: Path | Checkpoint) -> Checkpoint:
    """A model directory, checked by its config and headers, or one that was; no module is made before they agree.

    Raises one CheckpointError that lists all differences between the files and the model that the config describes.
    """
    if isinstance(source, Checkpoint):
        return source
    directory = source
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; name a directory with config.json and model.safetensors"
        )
    config, weights = read_config(directory), find_weights(directory)
    try:
        return _fitted(directory, config, weights)
    except CheckpointError as error:
        if weights.absent:
            raise CheckpointError(lacks(directory, weights.absent)) from error
        raise


def _fitted(directory: Path, config: Config, weights: Weights) -> Checkpoint:
    check_layers(config, weights.tensors, str(directory))
    layout = shapes(config)
    seen = view(config, layout, weights.tensors)
    present = {name: tensor for name, tensor in seen.tensors.items() if not config.is_unused(name)}
    _refuse_other_formats(directory, config, present)
    needed = packed_layout(layout, config.quantization, seen.tensors, str(directory / "config.json"))
    _refuse_differences(directory, {"among parts": list(seen.faults), **_differences(needed, present)})
    if not any(name.endswith(".scales") for name in present):  # a tool dequantized them and left it in the config
        config = replace(config, quantization=None)
    return Checkpoint(directory, config, weights, seen, tuple(needed))


def _refuse_other_formats(directory: Path, config: Config, present: Mapping[str, Tensor]) -> None:
    """CheckpointError for projections that are split, and for packed weights that the config does not mention."""
    if config.parts and any(".q_proj." in name or ".gate_proj." in name for name in present):
        raise CheckpointError(
            f"{directory}: its projections are split (q_proj, k_proj, ...), and phi3 needs them fused; type "
            f"`phi3-mlx convert {directory} -o NEW_DIRECTORY`"
        )
    packed = next((name for name in present if name.endswith(".scales")), None)
    if packed is not None and config.quantization is None:
        raise CheckpointError(
            f"{directory} holds packed weights ({packed}), but its config.json has no quantization; download it again"
        )


def _differences(
    needed: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]], present: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Kind of difference -> its lines, one a tensor. Dtypes are spelled as in safetensors' headers."""
    both = [(name, present[name], *needed[name]) for name in needed if name in present]
    return {
        "missing": [f"missing {name}" for name in needed if name not in present],
        "unexpected": [f"unexpected {name}" for name in present if name not in needed],
        "of another shape": [
            f"{name}: shape {tensor.shape}, expected {shape}"
            for name, tensor, shape, _ in both
            if tensor.shape != shape
        ],
        "of another dtype": [
            f"{name}: dtype {tensor.dtype}, expected {' or '.join(dtypes)}"
            for name, tensor, _, dtypes in both
            if tensor.dtype not in dtypes
        ],
    }


def _refuse_differences(directory: Path, kinds: Mapping[str, list[str]]) -> None:
    lines = [line for kind in kinds.values() for line in kind]
    if not lines:
        return
    counts = ", ".join(f"{len(kind)} {name}" for name, kind in kinds.items() if kind)
    more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    raise CheckpointError(
        "\n".join([f"{directory}: the weights do not fit config.json ({counts}).", *lines[:_LISTED], *more])
    )


def _read(checkpoint: Checkpoint, model: Model, target: mx.Dtype | None) -> None:
    """Fill the model tensor by tensor: with a cast, at most one is in memory in both types."""
    directory, needed, seen = checkpoint.directory, checkpoint.needed, checkpoint.view
    arrays: dict[str, mx.array] = {}  # not read before they are evaluated
    for file in checkpoint.weights.files:
        arrays |= read_arrays(file)
    if {name: array.shape for name, array in arrays.items()} != {
        name: tensor.shape for name, tensor in checkpoint.weights.tensors.items()
    }:
        raise CheckpointError(f"{directory} was changed while it was read; type the command again")
    left = Counter(part for name in needed for part in seen.origins.get(name, (name,)))

    def take(name: str) -> mx.array:
        """An array, which is forgotten here once no other tensor needs it."""
        left[name] -= 1
        return arrays[name] if left[name] > 0 else arrays.pop(name)

    for name in needed:
        parts = seen.origins.get(name, (name,))
        array = assemble(model.config, name, parts, seen.tensors[name].shape, take)
        if target is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(target)
            mx.eval(array)
        model.load_weights([(name, array)], strict=False)
        del array
    if "lm_head.weight" in arrays:
        _check_tied(directory, model, arrays.pop("lm_head.weight"), target)
    arrays.clear()
    mx.clear_cache()  # what the casts left behind


def _check_tied(directory: Path, model: Model, head: mx.array, target: mx.Dtype | None) -> None:
    """CheckpointError for a stored head that differs from the embedding, though the config ties the two.

    The reference ignores the config there and unties them.
    """
    if target is not None and mx.issubdtype(head.dtype, mx.floating):
        head = head.astype(target)
    embedding = model.model.embed_tokens.weight
    if mx.issubdtype(embedding.dtype, mx.floating) and not mx.array_equal(head, embedding):
        raise CheckpointError(
            f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false in config.json"
        )
