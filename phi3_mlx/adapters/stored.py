"""The matrices of a base as they are stored, read one at a time, so that a few can be read without loading a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models import read_config, shapes
from ..store.checkpoint import read_array
from ..store.quantization import find_packing
from ..store.safetensors import Tensor, find_weights


class StoredLayers:
    """The layers, packed or not, of a model directory that `checkpoint.outline` has checked."""

    def __init__(self, directory: Path):
        self._weights = find_weights(directory)
        self.tensors: dict[str, Tensor] = dict(self._weights.tensors)
        self._where = str(directory / "config.json")
        config = read_config(directory)
        self.quantization, self._shapes = config.quantization, shapes(config)

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
