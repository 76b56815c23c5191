"""A model directory, perhaps with an adapter in its weights, read without a second rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..adapters.lora import Adapter
from ..store.safetensors import Tensor
from .adapted import AdaptedSource
from .directory import DirectorySource
from .sources import Blocks, tensor_of


class ExactSource:
    """`base`, changed by `adapters` (by layer path) or with the tensors of `replaced` (the interface `Source`).

    What is packed or changed is read in float32, all else as it is stored. `blocks` are the packed weights that are not
    changed.
    """

    def __init__(
        self,
        base: DirectorySource,
        adapters: Mapping[str, Adapter] | None = None,
        replaced: Mapping[str, mx.array] | None = None,
    ):
        self.base, self.name, self.quantization = base, base.name, base.quantization
        self.config, self.raw_config = base.config, base.raw_config
        stored = AdaptedSource(base, adapters=adapters, replaced=replaced)
        self._floats = AdaptedSource(base, dequantize=True, dtype="float32", adapters=adapters, replaced=replaced)
        changed = {*(f"{path}.weight" for path in adapters or {}), *(replaced or {})}
        self._in_float32 = {*base.packings, *changed} & {*base.tensors}
        self.blocks: Mapping[str, Blocks] = {
            name: blocks for name, blocks in stored.blocks.items() if name in base.tensors and name not in changed
        }
        self.tensors: dict[str, Tensor] = {
            name: tensor_of("F32", tensor.shape) if name in self._in_float32 else tensor
            for name, tensor in base.tensors.items()
        }

    def read(self, name: str) -> mx.array:
        return (self._floats if name in self._in_float32 else self.base).read(name)

    def float_type(self, name: str) -> str | None:
        """The type of floats that a tensor is stored in; None where it is packed."""
        return self.base.float_type(name)

    def write_extras(self, directory: Path) -> None:
        self.base.write_extras(directory)
