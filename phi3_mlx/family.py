"""The released models: their shapes, as their config.json files give them, for what is asked before a download."""

from __future__ import annotations

import math
from typing import Any

from .config import Config
from .models import parse_config, shapes


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> Config:
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
_SMALL: dict[str, Any] = {
    "model_type": "phi3small",
    "hidden_size": 4096,
    "ff_intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 100352,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1000000,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
}
SMALL_8K = parse_config({**_SMALL, "max_position_embeddings": 8192})
SMALL_128K = parse_config({**_SMALL, "max_position_embeddings": 131072})


def parameter_count(config: Config) -> int:
    """How many numbers the model of `config` learned."""
    return sum(map(math.prod, shapes(config).values()))
