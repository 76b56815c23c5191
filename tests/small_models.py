"""Small random Phi-3-small models, and a directory of one, for the tests that are about them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizer_samples import tiktoken_ranks

from phi3_mlx.models import build, parse_config

RAW = {
    "model_type": "phi3small",
    "vocab_size": 96,
    "hidden_size": 32,
    "ff_intermediate_size": 40,
    "ff_dim_multiplier": None,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": False,
    "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "rope_scaling": None,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 4,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 3,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
ORIGINAL = 24
LONG = {
    "max_position_embeddings": ORIGINAL * 16,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.1, 1.3, 2.0],
        "long_factor": [1.1, 2.0, 9.0, 30.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}


def make(raw: dict, seed: int = 0):
    """A model with random weights of a spread that makes every position and every bias matter."""
    model = build(parse_config(raw))
    rng = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        values = rng.standard_normal(array.shape)
        if "layernorm.weight" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values *= 0.2
        else:
            values *= 0.3 if "embed" in name else 1.5 / np.sqrt(array.shape[-1])
        if "query_key_value" in name:
            values *= 1.7  # attention that prefers some keys, so that which are seen matters
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights)
    return model


def write(directory: Path, bits: int | None = None, **changes: object) -> Path:
    """A Hugging Face directory of a model 64 wide with a made tiktoken vocabulary."""
    raw = {**RAW, "vocab_size": 320, "hidden_size": 64, "ff_intermediate_size": 64, "eos_token_id": 300, **changes}
    tiktoken_ranks(directory, bos_token="<|endoftext|>")
    model = make(raw)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    raw |= {"bos_token_id": 300, "architectures": ["Phi3SmallForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory
