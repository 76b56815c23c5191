"""What can be converted: a checkpoint as a model's tensors, dequantized, fused and stacked, read one at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..config import Config
from ..errors import Phi3Error
from ..store.checkpoint import DTYPES
from ..store.finite import is_finite
from ..store.safetensors import Tensor

SPELLING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Blocks:
    """A quantized tensor whose stored blocks fit a format of MLX, so that nothing is rounded.

    `packing` is their group size, bits and mode; `read` gives weight, scales and biases.
    """

    packing: Mapping[str, Any]
    read: Callable[[], list[mx.array]]


class Source(Protocol):
    """A checkpoint to convert.

    `name` is what messages call it. `raw_config` is the config.json of the phi3 model in floats, and `config` what it
    says. `tensors` are the model's tensors, dequantized, projections fused, in the model's order; `quantization` is how
    the checkpoint itself is packed, if it is. `blocks` are those of the tensors that can be taken as they are stored.
    """

    name: str
    config: Config
    raw_config: dict[str, Any]
    tensors: dict[str, Tensor]
    quantization: Mapping[str, Any] | None
    blocks: Mapping[str, Blocks]

    def read(self, name: str) -> mx.array:
        """A tensor of `tensors`, in the dtype it has there; takes the memory of that tensor."""

    def write_extras(self, directory: Path) -> None:
        """Write tokenizer, chat template and the like into `directory`. CheckpointError for what is not the model's."""


class OpenedSource(Source, Protocol):
    """A source that says how it is stored: in floats, or packed."""

    def float_type(self, name: str) -> str | None:
        """The type of floats ("BF16") that a tensor is stored in; None where it is packed."""


def tensor_of(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A `Tensor` of that dtype (safetensors' spelling) and shape."""
    return Tensor(dtype, shape, math.prod(shape) * to_mlx(dtype).size)


def weights_of(source: Source) -> int:
    """How many weights the model has in floats: bits per weight are counted for each of them."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def source_digest(source: Source, beside: Any) -> str:
    """Tells sources, and what is asked of them (`beside`, as JSON), apart. All weights are read, which is soon done."""
    digest = hashlib.sha256(json.dumps(beside).encode())
    for name, tensor in source.tensors.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.array(source.read(name).reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def own_dtype(config: Config) -> str | None:
    """The dtype that config.json names, if it is one that weights can be kept in."""
    return config.dtype if config.dtype in DTYPES else None


def cast(name: str, array: mx.array, dtype: mx.Dtype, fault: type[Phi3Error], advice: str) -> mx.array:
    """The tensor `name` in `dtype`. Raises `fault`, ending in `advice`, where float16 cannot hold one of its values."""
    result = array.astype(dtype)
    if dtype == mx.float16 and array.dtype != mx.float16 and not is_finite(result):
        raise fault(f"{name} has values beyond what float16 holds{advice}")
    return result


def to_mlx(dtype: str) -> mx.Dtype:
    """MLX's dtype for a name in safetensors' spelling, of those that model directories hold."""
    return {"U32": mx.uint32, "U8": mx.uint8, **{SPELLING[name]: value for name, value in DTYPES.items()}}[dtype]
