"""Phi-3.5-MoE: two of sixteen experts a token. Numbers as transformers' `PhimoeForCausalLM` at inference.

Routing is the sparse mixer's (arXiv 2409.12136): an expert's weight is a softmax over the scores within 2 % of the
best, so it is 1 unless others come near, and the two weights do not add up to 1. Training routes in the same way, with
gradients through the softmax; the reference's random draws are for pre-training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import config
from ..config import Cut, LongRope, Reader
from . import decoder, layer
from .experts import Groups, SwitchLinear, waits_for_groups
from .hooks import at_flat, wanted
from .linear import Linear
from .rope import Rope

# Keys that change the numbers at any other value, which this package does not compute.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "num_experts_per_tok": (2,),  # the sparse mixer has two stages
    "partial_rotary_factor": (1, 1.0),
    "mlp_bias": (False,),
    "quantization_config": (),  # GPTQ, AWQ, bitsandbytes...: packed in ways mlx does not read
}
_EXPERTS = "block_sparse_moe.switch_mlp"
_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # ours and mlx-lm's, and Hugging Face's
_PER_TOKEN = 2


@dataclass(frozen=True)
class Config(config.Config):
    """A mixture-of-experts Phi (`model_type: phimoe`)."""

    layer_norm_eps: float  # the file calls it rms_norm_eps, but the norms are LayerNorms
    num_local_experts: int
    router_jitter_noise: float  # half the relative distance within which scores share a weight
    attention_bias: bool
    lm_head_bias: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader.refuse_unless(_MUST_BE)
        shared, rotary_dim = reader.shared(), reader.rotary_dim()
        if rotary_dim != shared["head_dim"]:
            reader.fail(f"partial_rotary_factor leaves {rotary_dim} of {shared['head_dim']} dims, and phimoe has none")
        tied, biased = reader.flag("tie_word_embeddings"), reader.flag("lm_head_bias")
        if tied and biased:
            reader.fail("tie_word_embeddings and lm_head_bias are both true, which is not supported")
        experts = reader.number("num_local_experts", 16)
        if experts < _PER_TOKEN:
            reader.fail(f"num_local_experts {experts} leaves a token no second expert")
        theta = reader.number("rope_theta", reader.number("rope_theta", 1e6, float), float, reader.rope)
        return cls(
            **shared,
            rope_theta=theta,
            rotary_dim=rotary_dim,
            longrope=_longrope(reader, rotary_dim),
            tie_word_embeddings=tied,
            layer_norm_eps=reader.number("rms_norm_eps", 1e-5, float),
            num_local_experts=experts,
            router_jitter_noise=reader.number("router_jitter_noise", 0.01, float),
            attention_bias=reader.flag("attention_bias"),
            lm_head_bias=biased,
        )

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner, experts = self.hidden_size, self.intermediate_size, self.num_local_experts
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "block_sparse_moe.gate": (experts, hidden),
            f"{_EXPERTS}.gate_proj": (experts, inner, hidden),
            f"{_EXPERTS}.up_proj": (experts, inner, hidden),
            f"{_EXPERTS}.down_proj": (experts, hidden, inner),
        }

    @property
    def adaptable(self) -> dict[str, tuple[int, int]]:
        return {path: shape for path, shape in super().adaptable.items() if path.startswith("self_attn.")}

    @property
    def router(self) -> str:
        return "block_sparse_moe.gate"

    @property
    def delicate(self) -> tuple[str, ...]:
        # A wrong expert costs more than the router's few bits save.
        return (self.router,)

    def made_of(self, name: str) -> tuple[str, ...]:
        for ours, theirs in _EXPERT_NAMES.items():
            before, marker, leaf = name.partition(f".{_EXPERTS}.{ours}.")
            if marker:
                stem = f"{before}.block_sparse_moe.experts"
                return tuple(f"{stem}.{expert}.{theirs}.{leaf}" for expert in range(self.num_local_experts))
        return (name,)

    def cut_from(self, name: str) -> Cut | None:
        # transformers 5's own layout, which it saves if told to (save_original_format=False).
        match = re.fullmatch(r"(model\.layers\.\d+)\.block_sparse_moe\.(?:switch_mlp\.)?(\w+)\.weight", name)
        if match is None:
            return None
        stem, inner = f"{match[1]}.mlp", self.intermediate_size
        return {
            "gate": Cut(f"{stem}.router.weight", 0, self.num_local_experts, self.num_local_experts),
            "gate_proj": Cut(f"{stem}.experts.gate_up_proj", 0, inner, 2 * inner),
            "up_proj": Cut(f"{stem}.experts.gate_up_proj", inner, 2 * inner, 2 * inner),
            "down_proj": Cut(f"{stem}.experts.down_proj", 0, self.hidden_size, self.hidden_size),
        }.get(match[2])

    @property
    def experts_per_token(self) -> int:
        return _PER_TOKEN


def _longrope(reader: Reader, rotary_dim: int) -> LongRope | None:
    """The factor lists and, for each regime, the number that multiplies cos and sin, which a file must give."""
    if reader.rope_kind() is None:
        return None
    if "yarn" in (reader.rope.get("type"), reader.rope.get("rope_type")):
        reader.fail("rope type 'yarn' is another scaling for phimoe, and is not supported; known: longrope")
    return LongRope(
        short_factor=reader.factors("short_factor", rotary_dim // 2),
        long_factor=reader.factors("long_factor", rotary_dim // 2),
        short_mscale=reader.number("short_mscale", kind=float, where=reader.rope),
        long_mscale=reader.number("long_mscale", kind=float, where=reader.rope),
    )


def route(scores: mx.array, tolerance: float) -> tuple[mx.array, mx.array]:
    """The two experts of every token and their weights, (N, 2) each, from the router's scores (N, experts).

    Source: transformers `modeling_phimoe.sparsemixer` with `training=False`; everything in the dtype of the scores.
    """
    left, experts, weights = scores, [], []
    for _ in range(_PER_TOKEN):
        best = mx.stop_gradient(left.max(axis=-1, keepdims=True))
        expert = mx.stop_gradient(mx.argmax(left, axis=-1, keepdims=True))
        # The distance is relative to the larger of the two sizes; 0 / 0, where all scores are 0, is near.
        far = (best - scores) / mx.maximum(mx.abs(scores), best) > tolerance
        shares = mx.softmax(mx.where(mx.stop_gradient(far), -mx.inf, left), axis=-1, precise=True)
        experts.append(expert)
        weights.append(mx.take_along_axis(shares, expert, axis=-1))
        left = mx.put_along_axis(left, expert, mx.array(-mx.inf, left.dtype), axis=-1)
    return mx.concatenate(experts, axis=-1), mx.concatenate(weights, axis=-1)


class Attention(layer.Attention):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = self._heads * self._dim, self._kv_heads * self._dim
        self.q_proj = Linear(hidden, queries, bias=bias)
        self.k_proj = Linear(hidden, keys, bias=bias)
        self.v_proj = Linear(hidden, keys, bias=bias)
        self.o_proj = Linear(queries, hidden, bias=bias)

    def qkv(self, x: mx.array) -> mx.array:
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)

    def output(self, x: mx.array) -> mx.array:
        return self.o_proj(x)


class Experts(nn.Module):
    """The experts' matrices, each kind stacked; names are mlx-lm's."""

    def __init__(self, config: Config):
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = SwitchLinear(experts, hidden, inner)
        self.up_proj = SwitchLinear(experts, hidden, inner)
        self.down_proj = SwitchLinear(experts, inner, hidden)

    def __call__(self, rows: mx.array, groups: Groups) -> mx.array:
        gate, up = self.gate_proj(rows, groups), self.up_proj(rows, groups)
        if not wanted("gate", "up", "act"):
            return self.down_proj(layer.swiglu(gate, up), groups)
        act = layer.swiglu(_by_token("gate", gate, groups), _by_token("up", up, groups))
        return self.down_proj(_by_token("act", act, groups), groups)


def _by_token(place: str, rows: mx.array, groups: Groups) -> mx.array:
    """`at` of rows (N * k, width), which is kept as (N, k, width)."""
    return groups.rows_of(at_flat(place, groups.by_token(rows)))


class SparseMoeBlock(nn.Module):
    """Each token through its two experts, whose outputs are weighted and added."""

    def __init__(self, config: Config):
        super().__init__()
        self._experts, self._tolerance = config.num_local_experts, 2 * config.router_jitter_noise
        self.gate = Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.switch_mlp = Experts(config)

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = route(at_flat("router", self.gate(tokens)), self._tolerance)
        experts, weights = at_flat("experts", experts), at_flat("expert_weights", weights)
        groups = Groups(experts, self._experts, x.dtype)
        rows = self.switch_mlp(groups.rows(tokens), groups)
        return groups.summed(rows * groups.ordered(weights)[:, None]).reshape(x.shape)


class DecoderLayer(layer.DecoderLayer):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        self.self_attn = Attention(config, rope, index)
        self.block_sparse_moe = SparseMoeBlock(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def feed_forward(self, x: mx.array) -> mx.array:
        return self.block_sparse_moe(x)

    def waits(self, tokens: int) -> bool:
        return waits_for_groups(tokens * _PER_TOKEN, self.input_layernorm.weight.dtype)


class PhiMoeModel(decoder.Decoder):
    layer_type = DecoderLayer
    _config: Config

    def add_norm(self) -> None:
        self.norm = nn.LayerNorm(self._config.hidden_size, self._config.layer_norm_eps)


class Model(decoder.Model):
    decoder_type = PhiMoeModel
    _config: Config

    @property
    def head_bias(self) -> bool:
        return self._config.lm_head_bias
