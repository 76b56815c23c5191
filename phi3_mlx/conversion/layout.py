"""The layout of a model to write: what becomes of each tensor of a source. Rounding and sinks follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..errors import OptionError
from ..fields import shorten
from ..store.quantization import PACKING_KEYS, complete
from ..store.safetensors import Tensor
from .recipes import Recipe
from .sources import Source, tensor_of

Scheme = Mapping[str, Any]  # group_size, bits and mode, each given


@dataclass(frozen=True)
class Entry:
    """A tensor of a source, as the source gives it, and how it is packed; None: it is written as it is."""

    name: str
    tensor: Tensor
    packing: Scheme | None = None

    @property
    def path(self) -> str:
        """The layer's path, where the tensor is a layer's weight."""
        return self.name.removesuffix(".weight")

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """What is written, by name: the tensor, or its packed weight, its scales and, if affine, its biases."""
        if self.packing is None:
            return {self.name: self.tensor}
        *rows, width = self.tensor.shape
        groups = (*rows, width // self.packing["group_size"])
        result = {self.name: tensor_of("U32", (*rows, width * self.packing["bits"] // 32))}
        if self.packing["mode"] == "affine":
            result[f"{self.path}.scales"] = result[f"{self.path}.biases"] = tensor_of(self.tensor.dtype, groups)
        else:
            result[f"{self.path}.scales"] = tensor_of("U8", groups)
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of what is written."""
        return sum(tensor.nbytes for tensor in self.stored.values())


@dataclass(frozen=True)
class Layout:
    """The entries of a model in the order in which they are made and written, one at a time.

    `recipe` says the same as config.json does; None where nothing is packed.
    """

    entries: tuple[Entry, ...]
    recipe: Recipe | None

    @classmethod
    def of(cls, source: Source, recipe: Recipe | None, name: str | None = None) -> Layout:
        """The layout of `source` when `recipe` packs it: all matrices whose width its groups divide.

        Raises OptionError, naming the recipe by `name` (without it: by the source), for one that does not fit the
        source's tensors, or packs none of them.
        """
        packings = _packings(recipe, source.tensors, name or source.name)
        return cls(tuple(Entry(name, tensor, packings.get(name)) for name, tensor in source.tensors.items()), recipe)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """All that is written, by name, in order."""
        return {name: tensor for entry in self.entries for name, tensor in entry.stored.items()}

    @cached_property
    def packings(self) -> dict[str, Scheme]:
        """How each tensor that is packed is packed, by its name."""
        return {entry.name: entry.packing for entry in self.entries if entry.packing is not None}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


# Makes the arrays of an entry, as `Entry.stored` says and in that order. It is asked for each entry of a layout once,
# in the layout's order, and keeps none of them.
Rounder = Callable[[Entry], list[mx.array]]


def _packings(recipe: Recipe | None, tensors: Mapping[str, Tensor], source: str) -> dict[str, Scheme]:
    if recipe is None:
        return {}

    def fail(why: str) -> OptionError:
        return OptionError(f"{source}: {why}")

    if not isinstance(recipe, Mapping) or not set(recipe) >= {"group_size", "bits"}:
        raise fail("a recipe is a JSON object with group_size, bits, and entries by layer")
    layers = {name.removesuffix(".weight"): name for name, tensor in tensors.items() if len(tensor.shape) > 1}
    unknown = next((key for key in recipe if key not in PACKING_KEYS and key not in layers), None)
    if unknown is not None:
        raise fail(
            f"{shorten(unknown, quote=False)} is no layer of this model; they are named like {next(iter(layers))}"
        )
    packings: dict[str, Scheme] = {}
    for path, name in layers.items():
        packing = _packing(recipe, path, fail)
        if packing is None:
            continue
        width = tensors[name].shape[-1]
        if width % packing["group_size"] == 0:
            packings[name] = packing
        elif path in recipe:
            raise fail(f"{path} is {width} wide, which groups of {packing['group_size']} do not divide")
    if not packings:
        raise fail(f"groups of {recipe['group_size']} divide no layer's width; choose a smaller group")
    return packings


def _packing(recipe: Recipe, path: str, fail: Callable[[str], OptionError]) -> Scheme | None:
    """How a recipe packs the layer `path`."""
    usual = {key: value for key, value in recipe.items() if key in PACKING_KEYS}
    entry = recipe.get(path, usual)
    if entry is False:
        return None
    entry = usual if entry is True else entry
    if not isinstance(entry, Mapping) or set(entry) - PACKING_KEYS:
        raise fail(f"the entry of {path} is {shorten(entry)}, expected false or {', '.join(sorted(PACKING_KEYS))}")
    try:
        return complete(None, **entry)
    except ValueError as error:
        raise fail(f"no such quantization for {path}: {shorten(str(error), quote=False)}") from error
