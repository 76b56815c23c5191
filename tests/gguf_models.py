"""Small models both as a directory of ours and as a GGUF file that is written without the exporter."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf_samples import metadata_of, phi3_tensors, sentencepiece_metadata, write_gguf
from tokenizer_samples import TINY


def hand_written(directory: Path, path: Path) -> Path:
    """The float32 model of `directory`, which has the bundled tokenizer, as a GGUF file."""
    raw = json.loads((directory / "config.json").read_text())
    weights = {name: np.array(array) for name, array in mx.load(str(directory / "model.safetensors")).items()}
    metadata = {**metadata_of(raw, "phi3"), "general.name": "phi-3 of random weights", **vocabulary(raw["vocab_size"])}
    return write_gguf(path, "phi3", metadata, phi3_tensors(raw, weights))


def vocabulary(size: int) -> dict:
    """The bundled tokenizer's metadata, padded to `size` tokens."""
    added = json.loads((TINY / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    found = sentencepiece_metadata(declared=added, padding=0)
    missing = size - len(found["tokenizer.ggml.tokens"])
    found["tokenizer.ggml.tokens"] += [f"[PAD{n}]" for n in range(missing)]
    found["tokenizer.ggml.scores"] += [-10000.0] * missing
    found["tokenizer.ggml.token_type"] += [5] * missing
    ids = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False, "add_space_prefix": True}
    return found | {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
