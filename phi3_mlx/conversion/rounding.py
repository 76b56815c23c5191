"""Which tensors a recipe packs and how, and packing them by rounding each weight to the nearest value there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import OptionError
from ..fields import shorten
from ..models import parse_config
from ..store.quantization import complete
from ..store.safetensors import Tensor
from .sources import Source, tensor_of

# As in config.json: `group_size`, `bits`, `mode`, and the same under the path of a layer that differs (or false).
Recipe = dict[str, Any]

_KEYS = {"group_size", "bits", "mode"}


def uniform(bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Recipe:
    """The recipe that treats all layers alike; None is the mode's own: 4 bits in groups of 64 for "affine".

    Raises OptionError for a combination that mlx does not have.
    """
    try:
        return complete(None, group_size, bits, mode)
    except ValueError as error:
        raise OptionError(f"no such quantization: {error}") from error


def left_alone(config: Mapping[str, Any]) -> Recipe:
    """The entries for what a model of this config.json has better unpacked, whatever the bits of the rest."""
    parsed = parse_config(config)
    layers = range(parsed.num_hidden_layers)
    return {f"model.layers.{i}.{path}": False for i in layers for path in parsed.delicate}


def packings(recipe: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Any]]:
    """Group size, bits and mode for each of `tensors` that `recipe` packs: matrices whose width its groups divide.

    None packs nothing. Raises OptionError, naming `source`, for a recipe that is none or does not fit the tensors.
    """
    if recipe is None:
        return {}

    def fail(why: str) -> OptionError:
        return OptionError(f"{source}: {why}")

    if not isinstance(recipe, Mapping) or not set(recipe) >= {"group_size", "bits"}:
        raise fail("a recipe is a JSON object with group_size, bits, and entries by layer")
    layers = {name.removesuffix(".weight"): name for name, tensor in tensors.items() if len(tensor.shape) > 1}
    unknown = next((key for key in recipe if key not in _KEYS and key not in layers), None)
    if unknown is not None:
        raise fail(
            f"{shorten(unknown, quote=False)} is no layer of this model; they are named like {next(iter(layers))}"
        )
    every = {key: value for key, value in recipe.items() if key in _KEYS}
    found = {}
    for path, name in layers.items():
        own = recipe.get(path, every)
        if own is False:
            continue
        own = every if own is True else own
        if not isinstance(own, Mapping) or set(own) - _KEYS:
            raise fail(f"the entry of {path} is {shorten(own)}, expected false or {', '.join(sorted(_KEYS))}")
        try:
            packing = complete(None, **own)
        except ValueError as error:
            raise fail(f"no such quantization for {path}: {shorten(str(error), quote=False)}") from error
        width = tensors[name].shape[-1]
        if width % packing["group_size"] == 0:
            found[name] = packing
        elif path in recipe:
            raise fail(f"{path} is {width} wide, which groups of {packing['group_size']} do not divide")
    return found


def planned(tensors: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors that will be written, in order, when `found` of `tensors` are packed."""
    result = {}
    for name, tensor in tensors.items():
        if name not in found:
            result[name] = tensor
            continue
        *rows, width = tensor.shape
        path, packing = name.removesuffix(".weight"), found[name]
        groups = (*rows, width // packing["group_size"])
        result[name] = tensor_of("U32", (*rows, width * packing["bits"] // 32))
        if packing["mode"] == "affine":
            result[f"{path}.scales"] = result[f"{path}.biases"] = tensor_of(tensor.dtype, groups)
        else:
            result[f"{path}.scales"] = tensor_of("U8", groups)
    return result


def rounded(source: Source, recipe: Mapping[str, Any] | None) -> Iterator[tuple[str, mx.array]]:
    """Every tensor of `source` as `recipe` wants it, by the names and in the order of `planned`; one in memory."""
    found = packings(recipe, source.tensors, source.name)
    for name in source.tensors:
        if name not in found:
            yield name, source.read(name)
            continue
        stored = source.blocks.get(name)
        if stored is not None and stored.packing == found[name]:
            parts = stored.read()
        else:
            parts = pack(source.read(name), found[name])
        path = name.removesuffix(".weight")
        for part in ("weight", "scales", "biases")[: len(parts)]:
            yield f"{path}.{part}", parts.pop(0)


def pack(weight: mx.array, packing: Mapping[str, Any]) -> list[mx.array]:
    """A matrix, or an array of them, packed: weight, scales and, in the affine mode, biases; evaluated."""
    streams = _streams() if mx.default_device().type == mx.DeviceType.cpu else [mx.default_stream(mx.default_device())]
    rows = -(-len(weight) // len(streams))
    pieces = [
        mx.quantize(weight[first : first + rows], **packing, stream=streams[i])
        for i, first in enumerate(range(0, len(weight), rows))
    ]
    mx.eval(pieces)
    del weight
    if len(pieces) == 1:
        return list(pieces[0])
    parts = [mx.concatenate(list(kind)) for kind in zip(*pieces, strict=True)]
    mx.eval(parts)
    return parts


@cache
def _streams() -> list[mx.Stream]:
    """One for each core: on the CPU a stream is a thread, and quantizing uses no more than its own."""
    return [mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, 8))]
