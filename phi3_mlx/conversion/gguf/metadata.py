"""What llama.cpp must know of a model's config. Source: its converter (conversion/phi.py) and loader."""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from ...config import Config
from ...errors import ConfigError
from ...models import phi3, phi_moe
from .tensor_names import LONG_FACTORS, SHORT_FACTORS

_QUANTIZATION_VERSION = 2  # of the blocks' layouts, as they are since May 2023
# What llama.cpp has no place for, under keys of our own: the numbers of each of LongRoPE's regimes, and the router's.
MSCALE_KEYS = {name: f"phi3_mlx.{name}" for name in ("short_mscale", "long_mscale")}
JITTER_KEY = "phi3_mlx.router_jitter_noise"


def architecture(config: Config, name: str) -> str:
    """llama.cpp's name of the model's architecture. ConfigError, naming the model, where it has none."""
    if not isinstance(config, (phi3.Config, phi_moe.Config)):
        raise ConfigError(
            f"{name} is a {config.model_type}, whose block-sparse attention llama.cpp does not have; it runs here alone"
        )
    return config.model_type


def model_metadata(config: Config, longrope: Literal["short", "long"]) -> dict[str, Any]:
    """The metadata under the architecture's name, and what it lacks under ours.

    `longrope`: the factors that the attention factor belongs to.
    """
    unplaced: dict[str, Any] = {}
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.sliding_window": config.sliding_window or 0,  # builds of 2024 do not load a file without it
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.longrope is not None:
        factor = config.longrope.long_mscale if longrope == "long" else config.longrope.short_mscale
        values["rope.scaling.attn_factor"] = float(factor)
    if isinstance(config, phi_moe.Config):
        # Its norms are LayerNorms; llama.cpp asks for the other key, and computes RMS norms.
        values |= dict.fromkeys(
            ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"), float(config.layer_norm_eps)
        )
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.experts_per_token}
        unplaced[JITTER_KEY] = float(config.router_jitter_noise)
        if config.longrope is not None:
            unplaced |= {key: float(getattr(config.longrope, name)) for name, key in MSCALE_KEYS.items()}
    elif isinstance(config, phi3.Config):
        values["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    prefix = config.model_type
    known = {f"{prefix}.{key}": value for key, value in values.items()}
    return {**known, **unplaced, "general.quantization_version": _QUANTIZATION_VERSION}


def extra_tensors(config: Config) -> dict[str, mx.array]:
    """Tensors that a checkpoint does not have and llama.cpp wants, by its names; float32.

    LongRoPE's factors; and for phimoe the biases that a config may leave out.
    """
    tensors: dict[str, mx.array] = {}
    if config.longrope is not None:
        tensors[LONG_FACTORS] = mx.array(config.longrope.long_factor, mx.float32)
        tensors[SHORT_FACTORS] = mx.array(config.longrope.short_factor, mx.float32)
    if isinstance(config, phi_moe.Config):
        if not config.attention_bias:
            for i in range(config.num_hidden_layers):
                for path, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output")):
                    rows = config.linears[f"self_attn.{path}"][0]
                    tensors[f"blk.{i}.attn_{letter}.bias"] = mx.zeros(rows)
        if not config.lm_head_bias:
            tensors["output.bias"] = mx.zeros(config.vocab_size)
    return tensors
