"""Small random models and data that the tuning tests share."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
from conftest import ROOT
from mlx.utils import tree_flatten

from phi3_mlx.models import build, parse_config
from phi3_mlx.tuning.examples import Example

TINY = ROOT / "weights" / "tiny"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
RAW = {
    **oracle.BASE,
    "vocab_size": 4032,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def make_directory(directory: Path, seed: int = 0, bits: int | None = None, **changes: int) -> Path:
    """A model directory of random weights with the bundled tokenizer, packed in groups of 32 if `bits`.

    `changes` are made to the config.
    """
    raw = {**RAW, **changes}
    model = build(parse_config(raw))
    rng = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        values = np.ones(array.shape) if "norm" in name else rng.standard_normal(array.shape) / np.sqrt(array.shape[-1])
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights)
    config: dict = dict(raw)
    if bits is not None:
        config["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
        nn.quantize(model, group_size=32, bits=bits)
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copy(TINY / name, directory)
    return directory


def copy_of(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def examples(lengths, vocab: int = 96, seed: int = 0, trained: float = 0.5) -> list[Example]:
    """Random sequences; about that share of the tokens is trained, the last always."""
    rng = np.random.default_rng(seed)
    made = []
    for n, length in enumerate(lengths):
        mask = rng.random(length) < trained
        mask[0], mask[-1] = False, True
        made.append(Example(rng.integers(2, vocab, length).astype(np.int32), mask, f"memory:{n}"))
    return made


def write_jsonl(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def facts(count: int, seed: int = 0) -> list[dict]:
    """Lines of prompt and completion of different lengths."""
    rng = np.random.default_rng(seed)
    names, things = "Mia Tom Ben Lily Sam".split(), "ball hat drum book car".split()
    lines = []
    for _ in range(count):
        name, thing = rng.choice(names), rng.choice(things)
        extra = " The sun is out." * int(rng.integers(0, 4))
        lines.append({"prompt": f"{name} has a {thing}.{extra} Who has it?", "completion": f"{name} has the {thing}."})
    return lines


def randomize(adapters, seed: int = 0) -> None:
    """Give adapters a change to make: those that begin begin with none."""
    rng = np.random.default_rng(seed)
    for adapter in adapters.values():
        adapter.lora_b = mx.array((0.3 * rng.standard_normal(adapter.lora_b.shape)).astype(np.float32))
        if adapter.is_dora:
            adapter.m = adapter.m * mx.array((1 + 0.1 * rng.standard_normal(adapter.m.shape)).astype(np.float32))
