"""A source whose values are checked and cast on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..store.finite import is_finite
from .sources import SPELLING, Blocks, Source, cast, tensor_of, to_mlx

_WAY_OUT = "; allow_nan=True converts it as it is"


class CheckedSource:
    """`source` with its tensors in `dtype` ("bfloat16", ...; None: each its own), refused where one is not finite.

    `read` raises CheckpointError for a tensor with NaN or infinite values, unless `allow_nan`.
    """

    def __init__(self, source: Source, *, dtype: str | None = None, allow_nan: bool = False):
        self.name, self.quantization = source.name, source.quantization
        self.config, self.raw_config = source.config, dict(source.raw_config)
        self.tensors = source.tensors
        if dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in self.raw_config] or ["torch_dtype"]
            self.raw_config |= dict.fromkeys(keys, dtype)
            self.config = replace(self.config, dtype=dtype)
            stored = SPELLING[dtype]
            self.tensors = {name: tensor_of(stored, tensor.shape) for name, tensor in source.tensors.items()}
        self.blocks: Mapping[str, Blocks] = {
            name: replace(blocks, read=partial(self._converted_blocks, name, blocks))
            for name, blocks in source.blocks.items()
        }
        self._source, self._allow_nan = source, allow_nan

    def read(self, name: str) -> mx.array:
        return self._converted(name, self._source.read(name))

    def _converted_blocks(self, name: str, blocks: Blocks) -> list[mx.array]:
        weight, *scales = blocks.read()
        return [weight, *(self._converted(name, array) for array in scales)]

    def _converted(self, name: str, array: mx.array) -> mx.array:
        dtype = to_mlx(self.tensors[name].dtype)
        if self._allow_nan:
            return array.astype(dtype)
        if not is_finite(array):
            raise CheckpointError(f"{name} is not finite in {self.name} (NaN or infinity){_WAY_OUT}")
        return cast(name, array, dtype, CheckpointError, f"; dtype='bfloat16' holds them{_WAY_OUT}")

    def write_extras(self, directory: Path) -> None:
        self._source.write_extras(directory)
