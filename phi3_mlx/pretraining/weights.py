"""The random weights that a pretraining begins with, and the model directory that it leaves."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import Config
from ..files import json_text
from ..models import build
from ..models.decoder import Model
from ..store.atomic import named, new_files
from ..store.companions import copy_companions

STD = 0.02  # of GPT-2, and of Hugging Face's initializer_range
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "w2.weight", "dense.weight")


def fresh_model(config: Config, seed: int, std: float = STD) -> Model:
    """A model of random float32 weights, all of them to be trained.

    Embeddings and matrices are drawn from a normal distribution with deviation `std`; those whose products are added to
    the hidden states (o_proj, down_proj) with `std` / sqrt(2 * layers), as GPT-2 has it (Radford et al. 2019, 2.3).
    Norms are 1, biases 0. Each tensor's draws depend on `seed` and its name alone.
    """
    model = build(config)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        weights.append((name, _drawn(name, array, seed, std, config.num_hidden_layers)))
    model.load_weights(weights)
    mx.eval(model.parameters())
    model.train()
    model.unfreeze()
    return model


def _drawn(name: str, like: mx.array, seed: int, std: float, layers: int) -> mx.array:
    if name.endswith("bias"):
        return mx.zeros(like.shape)
    if like.ndim < 2:
        return mx.ones(like.shape)
    if name.endswith(_INTO_RESIDUAL):
        std /= math.sqrt(2 * layers)
    key = mx.random.key((seed << 32) + zlib.crc32(name.encode()))
    return mx.random.normal(like.shape, key=key, scale=std)


def write_pretrained(directory: Path, model: Model, raw_config: Mapping[str, Any], tokenizer: Path) -> None:
    """Write the model and its tokenizer (of the directory `tokenizer`) as a model directory, whole or not at all.

    Raises OSError, and CheckpointError for a file that leads out of the tokenizer's directory.
    """
    config = {key: value for key, value in raw_config.items() if key != "dtype"}
    config["torch_dtype"] = str(model.dtype).removeprefix("mlx.core.")
    with new_files(directory, last="config.json") as folder:
        copy_companions(tokenizer, folder)
        with named(folder / "model.safetensors"), (folder / "model.safetensors").open("wb") as weights:
            mx.save_safetensors(weights, dict(tree_flatten(model.parameters())), {"format": "mlx"})
        (folder / "config.json").write_text(json_text(config, indent=2) + "\n", encoding="utf-8")
