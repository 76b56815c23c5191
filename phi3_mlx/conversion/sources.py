"""What can be converted: a checkpoint as the unpacked tensors of a model, fused and stacked, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..store.checkpoint import DTYPES
from ..store.safetensors import Tensor

SPELLING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Blocks:
    """A tensor that a checkpoint stores in blocks which mlx has too.

    `packing` is their group size, bits and mode; `read` gives weight, scales and biases as stored: nothing is rounded.
    """

    packing: Mapping[str, Any]
    read: Callable[[], list[mx.array]]


class Source(Protocol):
    """A checkpoint to convert.

    `name` is what messages call it. `config` is the config.json of the unquantized phi3 model, `tensors` its tensors
    in the model's order, unpacked and fused, `quantization` how the checkpoint itself is packed, if it is. `blocks`
    are those of the tensors that can be taken as they are stored.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    quantization: Mapping[str, Any] | None
    blocks: Mapping[str, Blocks]

    def read(self, name: str) -> mx.array:
        """A tensor of `tensors`, in that dtype; what it takes is the memory of that tensor."""

    def write_extras(self, directory: Path) -> None:
        """Write tokenizer, chat template and the like into `directory`. CheckpointError for what is not the model's."""


def tensor_of(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A `Tensor` of that dtype (safetensors' spelling) and shape."""
    return Tensor(dtype, shape, math.prod(shape) * to_mlx(dtype).size)


def weights_of(source: Source) -> int:
    """How many numbers a source holds, unpacked; sizes in bits per weight are per one of them."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def to_mlx(dtype: str) -> mx.Dtype:
    """MLX's dtype for safetensors' spelling of one that model directories hold."""
    return {"U32": mx.uint32, "U8": mx.uint8, **{SPELLING[name]: value for name, value in DTYPES.items()}}[dtype]
