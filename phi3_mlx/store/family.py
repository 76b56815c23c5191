"""The released models, with the shapes of their config.json files: what can be said of one before it is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import Config
from ..models import parse_config, shapes


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
_MOE = (4096, 6400, 32, 32, 8, 32064)
_PHI_4 = (5120, 17920, 40, 40, 10, 100352)

_MOE_KEYS: dict[str, Any] = {
    "model_type": "phimoe",
    "num_local_experts": 16,
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 131072,
}
_PHI_3_SMALL: dict[str, Any] = {
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


@dataclass(frozen=True)
class Member:
    """A released model: its `shape`, and the scores that were published.

    The shape is what memory depends on; LongRoPE's factors are left out. `mmlu`, in percent, is the model card's,
    5-shot (phi-4: by OpenAI's simple-evals); `mt_bench` the technical report's (arXiv 2404.14219), which gives one for
    a size, not for a context. None where neither gives one. Both are of one release: phi-3-mini's of April 2024, whose
    weights were replaced in June under the same name; `mmlu_june` is the new ones', which have no MT-bench.
    """

    shape: Config
    mmlu: float | None = None
    mt_bench: float | None = None
    mmlu_june: float | None = None

    @cached_property
    def parameters(self) -> int:
        """How many numbers the model learned."""
        return parameter_count(self.shape)


MEMBERS = {
    "phi-3-mini-4k": Member(_shape(*_MINI, 4096, sliding_window=2047), 68.8, 8.38, mmlu_june=70.9),
    "phi-3-mini-128k": Member(_shape(*_MINI, 131072), 68.1, mmlu_june=69.7),
    "phi-3.5-mini": Member(_shape(*_MINI, 131072)),
    "phi-3-small-8k": Member(parse_config({**_PHI_3_SMALL, "max_position_embeddings": 8192}), 75.7, 8.7),
    "phi-3-small-128k": Member(parse_config({**_PHI_3_SMALL, "max_position_embeddings": 131072}), 75.5),
    "phi-3-medium-4k": Member(_shape(*_MEDIUM, 4096, sliding_window=2047), 78.0, 8.9),
    "phi-3-medium-128k": Member(_shape(*_MEDIUM, 131072), 76.6),
    "phi-3.5-moe": Member(_shape(*_MOE, 131072, **_MOE_KEYS), 78.9),
    "phi-4": Member(_shape(*_PHI_4, 16384), 84.8),
    "phi-4-reasoning": Member(_shape(*_PHI_4, 32768)),
    "phi-4-mini": Member(_shape(3072, 8192, 32, 24, 8, 200064, 131072, tie_word_embeddings=True)),
}


def june_text() -> str:
    """A footnote for the table of scores: MMLU of the phi-3-mini weights that are downloaded today."""
    june = [f"{member.mmlu_june} ({name})" for name, member in MEMBERS.items() if member.mmlu_june is not None]
    return (
        "phi-3-mini's scores are those of its first release, April 2024. The weights of June 2024, which are "
        f"downloaded today, have an MMLU of {' and '.join(june)}, and no published MT-bench."
    )


def parameter_count(config: Config) -> int:
    """How many numbers the model of `config` learned."""
    return sum(map(math.prod, shapes(config).values()))


def packed_bytes(parameters: int, bits: int) -> int:
    """Bytes of this many weights. A packed one takes half a bit more: 64 share a scale and a bias of 16 bits each."""
    return int(parameters * (bits + (0.5 if bits < 16 else 0.0)) / 8)
