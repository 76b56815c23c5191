"""Recipes: the bits of every layer, as config.json says them."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..errors import OptionError
from ..store.quantization import complete

# As in config.json: `group_size`, `bits`, `mode`, and the same under the path of a layer that differs (or false).
Recipe = dict[str, Any]


def uniform(bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Recipe:
    """The recipe that treats all layers alike; None is the mode's own: 4 bits in groups of 64 for "affine".

    Raises OptionError for a combination that mlx does not have.
    """
    try:
        return complete(None, group_size, bits, mode)
    except ValueError as error:
        raise OptionError(f"no such quantization: {error}") from error


def left_alone(config: Config) -> Recipe:
    """The entries for the layers that stay in floats, whatever the bits of the rest."""
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{i}.{path}": False for i in layers for path in config.delicate}
