"""A base with an adapter in its weights, as the source of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..adapters.lora import Adapter, float_weight
from ..adapters.stored import read_layer
from ..errors import AdapterError, OptionError
from ..store.quantization import complete
from .directory import DirectorySource
from .layout import Entry, Layout, Scheme
from .recipes import Recipe
from .sources import SPELLING, Blocks, cast, own_dtype, tensor_of, to_mlx

_WAY_OUT_OF_OVERFLOW = " with the adapter in it; give dtype='bfloat16', with dequantize=True if the model is packed"


class AdaptedSource:
    """`base`, changed by `adapters` (by layer path) or with the tensors of `replaced` in place of its own.

    The tensors have the names and the order of the base's files. A packed base stays packed, unless `dequantize`:
    what the adapter leaves alone is taken as it is stored, what it changes is packed again as it was, or in `bits`.
    Changed weights are computed in float32. Floats are written in `dtype`, by default in the base's own.

    Raises OptionError for `bits` where nothing is packed, or which the packing does not have, and for `dtype` where
    the base stays packed.
    """

    def __init__(
        self,
        base: DirectorySource,
        *,
        dequantize: bool = False,
        dtype: str | None = None,
        bits: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        replaced: Mapping[str, mx.array] | None = None,
    ):
        self.base, self.name, self.quantization = base, base.name, base.quantization
        self.adapters, self.replaced = adapters or {}, replaced or {}
        self.stays_packed = base.quantization is not None and not dequantize
        if bits is not None and not self.stays_packed:
            raise OptionError("bits is for packed models, and this one is written in floats; leave it out")
        if dtype is not None and self.stays_packed:
            raise OptionError("dtype is for floats, and this model stays packed; give dequantize=True as well")
        self._bits = bits
        self.config, self.raw_config = base.config, dict(base.raw_config)
        written_in = None if self.stays_packed else dtype or own_dtype(base.config)
        if written_in is not None:
            self.config = replace(base.config, dtype=written_in)
            self.raw_config["torch_dtype"] = written_in
            self.raw_config.pop("dtype", None)
        self.tensors = {
            name: tensor_of(self._dtype_of(name, dtype), tensor.shape) for name, tensor in base.dequantized.items()
        }
        self.blocks: Mapping[str, Blocks] = {
            name: Blocks(packing, partial(self._as_stored, name))
            for name, packing in base.packings.items()
            if self.stays_packed and name.removesuffix(".weight") not in self.adapters
        }

    @property
    def before(self) -> Mapping[str, Blocks]:
        """What the base has stored of the tensors that adapters change, where they are packed again in the same way."""
        return {
            name: Blocks(packing, partial(self._as_stored, name))
            for name, packing in self.base.packings.items()
            if self.stays_packed and name not in self.blocks and self._packing(name) == packing
        }

    @property
    def rounds_adapters(self) -> bool:
        """Whether changed weights are packed again, so that some of the change may be rounded away."""
        return self.stays_packed and bool(self.adapters)

    def layout(self) -> Layout:
        """The base's own layout, but for what it changes: the bits of adapted layers, or all packing left out."""
        if not self.stays_packed:
            return Layout(tuple(Entry(name, tensor) for name, tensor in self.tensors.items()), None)
        packings = {name: self._packing(name) for name in self.base.packings}
        recipe: Recipe = dict(self.quantization or {})
        if self._bits is not None:
            adapted = {path: packings.get(f"{path}.weight") for path in self.adapters}
            recipe |= {path: packing for path, packing in adapted.items() if packing is not None}
        return Layout(tuple(Entry(name, tensor, packings.get(name)) for name, tensor in self.tensors.items()), recipe)

    def read(self, name: str) -> mx.array:
        path, packing = name.removesuffix(".weight"), self.base.packings.get(name)
        if path in self.adapters:
            array = self.adapters[path].changed_weight(read_layer(path, packing, self.base.load))
        elif packing is not None:
            array = float_weight(read_layer(path, packing, self.base.load))
        else:
            array = self.replaced[name] if name in self.replaced else self.base.load(name)
        return cast(name, array, to_mlx(self.tensors[name].dtype), AdapterError, _WAY_OUT_OF_OVERFLOW)

    def write_extras(self, directory: Path) -> None:
        self.base.write_extras(directory)

    def _dtype_of(self, name: str, given: str | None) -> str:
        """What a tensor is read in: packing rounds to values that scales of that type can spell."""
        packing, stored = self.base.packings.get(name), self.base.dequantized[name].dtype
        if not self.stays_packed:
            return SPELLING[given or own_dtype(self.base.config) or "bfloat16"] if given or packing else stored
        return "F32" if packing is not None and packing["mode"] != "affine" else stored

    def _packing(self, name: str) -> Scheme:
        packing = self.base.packings[name]
        if self._bits is None or name.removesuffix(".weight") not in self.adapters:
            return packing
        try:
            return complete(None, packing["group_size"], self._bits, packing["mode"])
        except ValueError as error:
            raise OptionError(f"bits {self._bits} cannot be honoured: {error}") from error

    def _as_stored(self, name: str) -> list[mx.array]:
        return [self.base.load(stored) for stored in Entry(name, self.tensors[name], self.base.packings[name]).stored]
