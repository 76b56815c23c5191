"""Dense Phi-3: mini, medium, Phi-3.5-mini, Phi-4, Phi-4-mini. Numbers as transformers' `Phi3ForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import config
from ..config import Reader
from . import decoder, layer
from .hooks import at
from .linear import Linear
from .rope import Rope

# Keys that change the numbers at any other value, which this package does not compute.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "embedding_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "quantize_activations": (False,),
    "quantization_config": (),  # GPTQ, AWQ, bitsandbytes...: packed in ways mlx does not read
}


@dataclass(frozen=True)
class Config(config.Config):
    """A dense Phi-3 model (`model_type: phi3`)."""

    rms_norm_eps: float

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader.refuse_unless(_MUST_BE)
        shared, rotary_dim = reader.shared(), reader.rotary_dim()
        longest, original = shared["max_position_embeddings"], shared["original_max_position_embeddings"]
        key = "original_max_position_embeddings"
        if reader.rope_kind() and reader.raw.get(key) is None and original != min(longest, 4096):
            # transformers and mlx-lm read it at the top level alone, and take 4096 where it is absent.
            reader.fail(f"{key} {original} is given in {reader.rope_key} alone, where nobody reads it; put it beside")
        theta = reader.number("rope_theta", reader.number("rope_theta", 10000.0, float), float, reader.rope)
        return cls(
            **shared,
            rope_theta=theta,
            rotary_dim=rotary_dim,
            longrope=reader.longrope(rotary_dim, longest, original),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-5, float),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.qkv_proj": (queries + 2 * keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def parts(self) -> dict[str, dict[str, tuple[int, int]]]:
        q, kv, inner = (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.intermediate_size,
        )
        return {
            "qkv_proj": {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)},
            "gate_up_proj": {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)},
        }

    def made_of(self, name: str) -> tuple[str, ...]:
        for module, parts in self.parts.items():
            if f".{module}." in name:
                return tuple(name.replace(module, part) for part in parts)
        return (name,)


class Attention(layer.Attention):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        rows = (self._heads + 2 * self._kv_heads) * self._dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=False)
        self.o_proj = Linear(self._heads * self._dim, config.hidden_size, bias=False)

    def qkv(self, x: mx.array) -> mx.array:
        return self.qkv_proj(x)

    def output(self, x: mx.array) -> mx.array:
        return self.o_proj(x)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(at("act", layer.swiglu(at("gate", gate), at("up", up))))


class DecoderLayer(layer.DecoderLayer):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        self.self_attn = Attention(config, rope, index)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Phi3Model(decoder.Decoder):
    layer_type = DecoderLayer
    _config: Config

    def add_norm(self) -> None:
        self.norm = nn.RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)


class Model(decoder.Model):
    decoder_type = Phi3Model
