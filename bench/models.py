"""The models that speed and memory are measured on: random weights at true shapes, and the bundled one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi3_mlx import resolve
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine.machine import room
from phi3_mlx.models import build, parse_config
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.quantization import DEFAULTS
from phi3_mlx.text.tokenizer import Tokenizer

from . import record

# Phi-3-mini-4k; without its window, which mlx-lm does not have and which these lengths do not reach.
PHI_3_MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# What differs, of others of the family.
OTHERS: dict[str, dict[str, Any]] = {
    "Phi-4-mini": {
        "vocab_size": 200064,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "Phi-3-medium": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
    },
}
SMALL = {  # the bundled model's widths
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4032,
}
RANK = 8  # of adapters
CASES = ("bfloat16", "float32", *OTHERS, "tiny")
# By default; of the unpacked weights two models must fit.
LAYERS = 2 if not record.on_gpu() else 32 if room() > 40e9 else 8
DTYPE = "bfloat16" if record.on_gpu() else "float32"  # that a model is computed in, if it is not said


TWO_LAYERS = {
    "vocab_size": 4032,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 131_072,
}

# Phi-3-mini's proportions, a sixth as wide; a context that holds the long newcomer.
MIDDLING = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
}


def default_cases(cases: tuple[str, ...]) -> list[str]:
    """Those that are measured if none is asked for: nobody gives a GPU float32 scales."""
    return [case for case in cases if not (case == "float32" and record.on_gpu())]


def make_checkpoint(directory: Path, layers: int, dtype: str, bits: int, **shape: Any) -> None:
    """Random weights of Phi-3-mini's shape but for `shape`; with `bits` 0 they stay numbers of `dtype`."""
    config = {**PHI_3_MINI, **shape, "num_hidden_layers": layers, "torch_dtype": dtype}
    model = build(parse_config(config))
    model.set_dtype(getattr(mx, dtype))
    if bits:
        config["quantization"] = {"group_size": DEFAULTS["affine"][0], "bits": bits}
        nn.quantize(model, **config["quantization"])
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one after another: in floats all of them together may not fit
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))


def make_model(directory: Path) -> None:
    """A checkpoint of `TWO_LAYERS` with random weights in 4 bits, and the bundled model's tokenizer."""
    make_checkpoint(directory, 2, "float32", 4, **TWO_LAYERS)
    copy_tokenizer(directory)


def copy_tokenizer(directory: Path) -> None:
    """Give a checkpoint the bundled model's tokenizer, whose vocabulary has 4,032 ids."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(resolve("tiny") / name, directory)


@contextmanager
def loaded(case: str, layers: int, shape: Mapping[str, int] | None = None) -> Iterator[tuple[Any, Any, str]]:
    """A case's model as phi3-mlx and as mlx-lm load it, and its name. "unpacked" is `DTYPE` that was not packed.

    `shape` differs from Phi-3-mini's.
    """
    from mlx_lm.utils import load_model as load_mlx_lm

    with tempfile.TemporaryDirectory() as folder:
        directory = resolve("tiny") if case == "tiny" else Path(folder, "model")
        name = "the bundled model"
        if case != "tiny":
            packed, dtype = case != "unpacked", case if case in ("bfloat16", "float32") else DTYPE
            make_checkpoint(directory, layers, dtype, 4 if packed else 0, **(shape or OTHERS.get(case, {})))
            kind = f"4-bit, {dtype} scales" if packed else dtype
            like = f"{case if case in OTHERS else 'Phi-3-mini'}'s shape"
            if shape is not None:
                like = f"{shape['hidden_size']} numbers"
            name = f"{kind}, {layers} {'layer' if layers == 1 else 'layers'} of {like}"
        ours, theirs = read_model(directory), load_mlx_lm(directory)[0]
        mx.eval(ours.parameters(), theirs.parameters())
        kinds = [{key: (a.shape, a.dtype) for key, a in tree_flatten(m.parameters())} for m in (ours, theirs)]
        if kinds[0] == kinds[1]:
            theirs.update(ours.parameters())  # of two copies either may lie better: the same step took 1.5 % more
        yield ours, theirs, name


def text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """A text of so many tokens, repeated if need be."""
    ids = tokenizer.encode(bundled("sample"))
    return tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])
