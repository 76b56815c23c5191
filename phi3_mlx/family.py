"""The released models: their shapes, as their config.json files give them, for what is asked before a download."""

from __future__ import annotations

from typing import Any

from .config import Phi3Config, parse_config


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> Phi3Config:
    return parse_config(
        {
            "model_type": "phi3",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": context,
            **more,
        }
    )


_MINI = (3072, 8192, 32, 32, 32, 32064)
_MEDIUM = (5120, 17920, 40, 40, 10, 32064)
_PHI_4 = (5120, 17920, 40, 40, 10, 100352)

# What memory depends on. The rotation is left out: it costs none.
MINI_4K = _shape(*_MINI, 4096, sliding_window=2047)
MINI_128K = _shape(*_MINI, 131072)
MEDIUM_4K = _shape(*_MEDIUM, 4096, sliding_window=2047)
MEDIUM_128K = _shape(*_MEDIUM, 131072)
PHI_4 = _shape(*_PHI_4, 16384)
PHI_4_REASONING = _shape(*_PHI_4, 32768)
PHI_4_MINI = _shape(3072, 8192, 32, 24, 8, 200064, 131072, tie_word_embeddings=True)


def parameter_count(config: Phi3Config) -> int:
    """How many numbers the model of `config` learned."""
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + hidden
