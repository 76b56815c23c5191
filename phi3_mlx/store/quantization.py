"""Packed (quantized) weights: which layers of a checkpoint are packed and how, and which ways of packing exist.

The format is mlx-lm's: `weight` becomes packed uint32 beside `scales` (and `biases` in the affine mode), and
config.json gets `quantization` with `group_size`, `bits`, `mode`, and a dictionary of the same keys (or false)
under the path of every layer that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from ..fields import shorten
from .safetensors import Tensor

DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # mode -> group size, bits
FLOATS = ("BF16", "F16", "F32")  # the types of floats, as safetensors spells them
PACKING_KEYS = {"group_size", "bits", "mode"}
_LARGEST_SETTING = 1024  # for a group size or bits; mlx raises other errors for numbers beyond 32 bits


def pack_like(model: nn.Module, quantization: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Replace the layers that a checkpoint has packed by packed ones, with random weights that are not computed.

    A layer that `quantization` names is packed as it says there. Any other is packed if the checkpoint has scales for
    it; its shapes then give group size and bits, as in mlx-lm. Raises ConfigError, naming `source`.
    """

    def how(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized"):
            return False
        return find_packing(path, layer.weight.shape[-1], quantization, tensors, source) or False

    nn.quantize(model, class_predicate=how)


def packed_layout(
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    source: str,
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The tensors that a checkpoint should have, packed as it is, for a model of these `shapes` before it is quantized.

    For each name its shape and the types (as safetensors spells them) in which it may be stored. Which layers are
    packed, and the ConfigError, are `pack_like`'s.
    """
    result: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        packing = None
        if quantization is not None and leaf == "weight" and len(shape) > 1:
            packing = find_packing(path, shape[-1], quantization, tensors, source)
        if packing is None:
            result[name] = shape, FLOATS
            continue
        *rows, width = shape
        groups = (*rows, width // packing["group_size"])
        affine = packing["mode"] == "affine"
        result[name] = (*rows, width * packing["bits"] // 32), ("U32",)
        result[f"{path}.scales"] = groups, FLOATS if affine else ("U8",)
        if affine:
            result[f"{path}.biases"] = groups, FLOATS
    return result


def find_packing(
    path: str, width: int, quantization: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Any] | None:
    """Group size, bits and mode of the layer `path`, which has `width` inputs; None if it is not packed.

    The rule and the ConfigError are `pack_like`'s.
    """
    given = quantization.get(path, f"{path}.scales" in tensors)
    if given is False:
        return None
    if given is True:
        stored = None if path in quantization else _as_stored(width, path, tensors)
        given = stored or {key: quantization[key] for key in PACKING_KEYS if key in quantization}
    if not isinstance(given, Mapping) or set(given) - PACKING_KEYS:
        raise ConfigError(
            f"{source}: quantization of {path} is {shorten(given)}, expected false or {sorted(PACKING_KEYS)}"
        )
    try:
        return complete(width, **given)
    except ValueError as error:
        raise ConfigError(f"{source}: quantization of {path} cannot be honoured: {error}") from error


def _as_stored(width: int, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Group size, bits and mode of a packed layer of `width` inputs, None if its shapes contradict each other."""
    weight, scales = tensors.get(f"{path}.weight"), tensors[f"{path}.scales"]
    if not width or weight is None or not weight.shape or not scales.shape or not scales.shape[-1]:
        return None
    group_size, bits = width // scales.shape[-1], weight.shape[-1] * 32 // width
    # Only affine keeps its scales as floats; each other mode has one group size and width.
    modes = [mode for mode, settings in DEFAULTS.items() if mode != "affine" and settings == (group_size, bits)]
    modes = modes if scales.dtype == "U8" else ["affine"]
    try:
        return complete(width, group_size, bits, modes[0]) if modes else None
    except ValueError:
        return None


def complete(
    width: int | None, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
) -> dict[str, Any]:
    """Group size, bits and mode; None takes the mode's default. ValueError unless mlx can pack `width` inputs so."""
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise ValueError(f"mode {shorten(mode)} is unknown; choose {', '.join(DEFAULTS)}")
    group_size = DEFAULTS[mode][0] if group_size is None else group_size
    bits = DEFAULTS[mode][1] if bits is None else bits
    # Checked here because a group size of 0 is a division by zero in mlx, and the end of the process.
    if any(type(number) is not int or not 1 <= number <= _LARGEST_SETTING for number in (group_size, bits)):
        raise ValueError(
            f"group_size {shorten(group_size)} and bits {shorten(bits)} must be integers from 1 to {_LARGEST_SETTING:,}"
        )
    try:
        mx.quantize(mx.zeros((8, width or group_size)), group_size, bits, mode)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {"group_size": group_size, "bits": bits, "mode": mode}
