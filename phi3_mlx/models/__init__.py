"""The members of the family, one architecture a file; a config's `model_type` picks it.

A file has `Config` (with `read`), `DecoderLayer` and `Model`; what they share is in `decoder`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import ROPE_KEYS, Config, Reader, read_json
from ..errors import CheckpointError
from ..fields import shorten
from ..paths import no_model
from .decoder import Model

# model_type -> (file, the models of that type)
ARCHITECTURES = {
    "phi3": ("phi3", "Phi-3 mini/medium, Phi-3.5-mini, Phi-4, Phi-4-mini"),
    "phimoe": ("phi_moe", "Phi-3.5-MoE"),
    "phi3small": ("phi3_small", "Phi-3-small"),
}
_LAYERS = "model.layers."
_FIRST = f"{_LAYERS}0."


def read_config(directory: Path) -> Config:
    """The validated config of a model directory. Raises CheckpointError (no file) or ConfigError (its content)."""
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(no_model(directory))
    return parse_config(read_json(path), str(path))


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> Config:
    """Validate the dictionary of a config.json; `source` names it in the ConfigError."""
    if all(raw.get(key) for key in ROPE_KEYS):
        # Written for old software and new, which read one of them. Each alone must give the same numbers.
        old, new = (parse_config({**raw, other: None}, source) for other in ROPE_KEYS)
        if old != new:
            differ = ", ".join(
                field.name for field in fields(old) if getattr(old, field.name) != getattr(new, field.name)
            )
            Reader({}, source).fail(
                f"rope_scaling and rope_parameters are both given, and differ in what they make of {differ}; remove one"
            )
        return new
    reader, model_type = Reader(raw, source), raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(f"{name} ({who})" for name, (_, who) in ARCHITECTURES.items())
        reader.fail(
            f"model_type {shorten(model_type)} is not supported; this version runs {known}, and answers of others with "
            "mlx-lm (mlx-lm:NAME for generate, chat and serve)"
        )
    config: Config = _member(model_type).Config.read(reader)
    return config


def build(config: Config) -> Model:
    """A model of random weights for a config; nothing is computed until its weights are used."""
    model: Model = _member(config.model_type).Model(config)
    return model


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model before it is quantized, in the model's order.

    Modules are made for one layer alone: all layers have the same, and a config may ask for any number of them.
    """
    parameters: list[tuple[str, mx.array]] = tree_flatten(build(replace(config, num_hidden_layers=1)).parameters())
    layer = {name: array.shape for name, array in parameters if name.startswith(_FIRST)}
    result: dict[str, tuple[int, ...]] = {}
    for name, array in parameters:
        if name not in layer:
            result[name] = array.shape
        elif name not in result:
            for i in range(config.num_hidden_layers):
                result |= {
                    f"{_LAYERS}{i}.{name_in_layer.removeprefix(_FIRST)}": shape
                    for name_in_layer, shape in layer.items()
                }
    return result


def check_layers(config: Config, names: Collection[str], source: str) -> None:
    """CheckpointError if the config has more layers than there are tensors; `names` are theirs.

    Call it before anything is made for every layer. `source` names the model in the message.
    """
    if config.num_hidden_layers > len(names):
        layers = {name.removeprefix(_LAYERS).partition(".")[0] for name in names if name.startswith(_LAYERS)}
        raise CheckpointError(
            f"{source}: config.json says num_hidden_layers {config.num_hidden_layers:,}, and the weights have "
            f"{len(layers):,} layers; download the model again"
        )


def _member(model_type: str) -> Any:
    return import_module(f".{ARCHITECTURES[model_type][0]}", __name__)
