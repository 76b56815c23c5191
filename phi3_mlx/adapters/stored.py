"""The matrices of a base as they are stored, read one at a time, so that a few can be read without loading a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models import shapes
from ..store.checkpoint import Checkpoint, read_array
from ..store.quantization import find_packing


class StoredLayers:
    """The layers, packed or not, of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self._weights, self._where = checkpoint.weights, str(checkpoint.directory / "config.json")
        self.tensors = checkpoint.weights.tensors
        self.quantization, self._shapes = checkpoint.config.quantization, shapes(checkpoint.config)

    def packing(self, path: str) -> dict[str, Any] | None:
        """Group size, bits and mode of a layer, None if it is not packed."""
        shape = self._shapes.get(f"{path}.weight")
        if self.quantization is None or shape is None or f"{path}.scales" not in self.tensors:
            return None
        return find_packing(path, shape[-1], self.quantization, self.tensors, self._where)

    def layer(self, path: str) -> nn.Module:
        """A linear layer's arrays, read when they are evaluated; scales in float32."""
        return read_layer(path, self.packing(path), self.read)

    def read(self, name: str) -> mx.array:
        """A tensor, read when it is evaluated."""
        return read_array(self._weights, name)


def read_layer(path: str, packing: Mapping[str, Any] | None, read: Callable[[str], mx.array]) -> nn.Module:
    """The linear layer `path` from the arrays that `read` gives by name, packed as `packing`; scales in float32."""
    layer = nn.Module()
    layer.weight = read(f"{path}.weight")
    if packing is not None:
        scales = read(f"{path}.scales")
        layer.scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.float32)
        if packing["mode"] == "affine":
            layer.biases = read(f"{path}.biases").astype(mx.float32)
        layer.group_size, layer.bits, layer.mode = packing["group_size"], packing["bits"], packing["mode"]
    return layer
