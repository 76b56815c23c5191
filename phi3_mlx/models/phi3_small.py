"""Phi-3-small (7B): block-sparse attention in every other layer, muP scales, GEGELU, cl100k's vocabulary.

Source: arXiv 2404.14219, section 2; `modeling_phi3_small` and `configuration_phi3_small` of the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import config
from ..config import BlockPattern, LongRope, Reader
from . import blocksparse, decoder, layer
from .attention import Mask
from .cache import KVCache
from .hooks import at, wanted
from .linear import Linear
from .rope import Rope

# Keys that change the numbers at any other value, which this package does not compute.
# `attention_bias` is not among them: the reference has biases whatever it says.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gegelu",),
    "ff_dim_multiplier": (),
    "reorder_and_upcast_attn": (False,),
    "sliding_window": (),
    "partial_rotary_factor": (1, 1.0),
    "layer_types": (),
    "quantization_config": (),
}
# Where these are absent the reference takes another value than null means, so they must be given.
_STATED = (
    "gegelu_limit",
    "mup_use_scaling",
    "mup_embedding_multiplier",
    "mup_attn_multiplier",
    "mup_width_multiplier",
    "dense_attention_every_n_layers",
)
# Rows of the embedding that no token of the vocabulary stands for; the reference never lets them be chosen.
_DUMMY_IDS = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352))


@dataclass(frozen=True)
class Config(config.Config):
    """A Phi-3-small model (`model_type: phi3small`).

    The multipliers are muP's; without `attention_multiplier` scores are scaled as usual. Of `dense_every` layers the
    last is dense; None: no layer is.
    """

    layer_norm_epsilon: float
    gegelu_limit: float | None
    embedding_multiplier: float
    attention_multiplier: float | None
    width_multiplier: float
    pattern: BlockPattern
    dense_every: int | None

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader.refuse_unless(_MUST_BE)
        raw, shared = reader.raw, reader.shared("ff_intermediate_size")
        for key in _STATED:
            if key not in raw:
                reader.fail(f"{key} is missing")
        longest, stride = shared["max_position_embeddings"], reader.number("blocksparse_vert_stride")
        if reader.rope_kind() is None:
            shared["original_max_position_embeddings"] = longest
        homogeneous = reader.flag("blocksparse_homo_head_pattern")
        return cls(
            **shared,
            rope_theta=reader.number("rope_embedding_base", kind=float),
            rotary_dim=reader.rotary_dim(),
            longrope=_longrope(reader, shared["head_dim"], longest),
            tie_word_embeddings=raw.get("tie_word_embeddings") is None or reader.flag("tie_word_embeddings"),
            layer_norm_epsilon=reader.number("layer_norm_epsilon", kind=float),
            gegelu_limit=None if raw["gegelu_limit"] is None else reader.number("gegelu_limit", kind=float),
            embedding_multiplier=_positive(reader, "mup_embedding_multiplier", 1.0),
            attention_multiplier=(
                reader.number("mup_attn_multiplier", kind=float) if reader.flag("mup_use_scaling") else None
            ),
            width_multiplier=reader.number("mup_width_multiplier", 1.0, float),
            pattern=BlockPattern(
                block_size=reader.number("blocksparse_block_size"),
                local_blocks=reader.number("blocksparse_num_local_blocks"),
                stride=stride,
                head_step=0 if homogeneous else max(1, stride // shared["num_attention_heads"]),
            ),
            dense_every=(
                reader.number("dense_attention_every_n_layers") if raw["dense_attention_every_n_layers"] else None
            ),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.query_key_value": (queries + 2 * keys, self.hidden_size),
            "self_attn.dense": (self.hidden_size, queries),
            "mlp.up_proj": (2 * self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def mlp_kept(self) -> int:
        return 2  # gates and linear parts; their product is recomputed

    @property
    def softmax_scale(self) -> float:
        if self.attention_multiplier is None:
            return super().softmax_scale
        return self.attention_multiplier / self.head_dim

    @property
    def sparse_layers(self) -> BlockPattern | None:
        return None if self.dense_every == 1 else self.pattern

    def is_dense(self, layer: int) -> bool:
        return self.dense_every is not None and (layer + 1) % self.dense_every == 0


def _positive(reader: Reader, key: str, default: float, where: Mapping[str, Any] | None = None) -> float:
    """A number, or the default where it is absent, null, zero or negative, as the reference reads it."""
    value = (reader.raw if where is None else where).get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        return default
    number: float = reader.number(key, default, float, where)
    return number


def _longrope(reader: Reader, head_dim: int, longest: int) -> LongRope | None:
    """The 128K model's factors; or the 8K model's positions scaled, which is the same as all factors divided by it."""
    if reader.rope_kind() is None:
        scale = reader.number("rope_position_scale", 1.0, float)
        factors = (1 / scale,) * (head_dim // 2)
        return None if scale == 1 else LongRope(factors, factors, 1.0, 1.0)
    if reader.rope.get("original_max_position_embeddings") is None:
        reader.fail(f"{reader.rope_key}.original_max_position_embeddings is missing")
    original = reader.original_length()
    if original == 1:
        reader.fail("original_max_position_embeddings is 1, which leaves LongRoPE nothing to extend")
    automatic = math.sqrt(1 + math.log(longest / original) / math.log(original))
    return LongRope(
        short_factor=reader.factors("short_factor", head_dim // 2),
        long_factor=reader.factors("long_factor", head_dim // 2),
        short_mscale=_positive(reader, "short_mscale", 1.0, reader.rope),
        long_mscale=_positive(reader, "long_mscale", automatic, reader.rope),
    )


class Attention(layer.Attention):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        self._pattern = None if config.is_dense(index) else config.pattern
        rows = (self._heads + 2 * self._kv_heads) * self._dim
        self.query_key_value = Linear(config.hidden_size, rows)
        self.dense = Linear(self._heads * self._dim, config.hidden_size)

    def qkv(self, x: mx.array) -> mx.array:
        return self.query_key_value(x)

    def split(self, qkv: mx.array, rotate: Callable[[mx.array], mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """The outputs of a kv head stand together: its queries, its key and its value."""
        batch, length, _ = qkv.shape
        group = self._heads // self._kv_heads
        qkv = qkv.reshape(batch, length, self._kv_heads, group + 2, self._dim).transpose(0, 2, 3, 1, 4)
        q = qkv[:, :, :group].reshape(batch, self._heads, length, self._dim)
        return rotate(q), rotate(qkv[:, :, group]), qkv[:, :, group + 1]

    def output(self, x: mx.array) -> mx.array:
        return self.dense(x)

    def attend(self, q: mx.array, seen: list[mx.array], cache: KVCache | None, mask: Mask) -> mx.array:
        if self._pattern is None:
            return super().attend(q, seen, cache, mask)
        return blocksparse.attend_in_blocks(q, seen, cache, self._rope.scale, mask, self._pattern)

    def visible(self, mask: Mask, queries: int, keys: int, padding: Sequence[int]) -> Mask:
        if self._pattern is None or keys - min(padding) <= self._pattern.reach:
            return mask
        return blocksparse.visible_keys(self._pattern, self._heads, queries, keys, padding)


def _bounded(gate: mx.array, linear: mx.array, limit: float) -> tuple[mx.array, mx.array]:
    """Infinities stay, as in the reference."""
    gate = mx.where(mx.isinf(gate), gate, mx.minimum(gate, limit))
    return gate, mx.where(mx.isinf(linear), linear, mx.clip(linear, -limit, limit))


@partial(mx.compile, shapeless=True)
def _gegelu(gate: mx.array, linear: mx.array, limit: float) -> mx.array:
    gate, linear = _bounded(gate, linear, limit)
    return gate * mx.sigmoid(1.702 * gate) * (linear + 1)


@partial(mx.compile, shapeless=True)
def _gegelu_gradients(gate: mx.array, linear: mx.array, cotangent: mx.array, limit: float) -> tuple[mx.array, mx.array]:
    # MLX's own would be a dozen arrays of this size, one an operation.
    free_gate, free_linear = (gate <= limit) | mx.isinf(gate), (mx.abs(linear) <= limit) | mx.isinf(linear)
    gate, linear = _bounded(gate, linear, limit)
    slope = mx.sigmoid(1.702 * gate)
    by_gate = cotangent * (linear + 1) * (slope + 1.702 * gate * slope * (1 - slope))
    return mx.where(free_gate, by_gate, 0), mx.where(free_linear, cotangent * gate * slope, 0)


def gegelu(both: mx.array, limit: float) -> mx.array:
    """(..., 2 n), gates and linear parts in turn, -> (..., n); for the backward pass `both` alone is kept."""

    @mx.custom_function
    def forward(both: mx.array) -> mx.array:
        return _gegelu(both[..., 0::2], both[..., 1::2], limit)

    @forward.vjp
    def backward(both: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        gradients = _gegelu_gradients(both[..., 0::2], both[..., 1::2], cotangent, limit)
        return mx.stack(list(gradients), axis=-1).reshape(both.shape)

    return forward(both)  # type: ignore[return-value]


class MLP(nn.Module):
    """GEGELU: the rows of `up_proj` are a gate's and a linear part's in turn."""

    def __init__(self, config: Config):
        super().__init__()
        self._limit = math.inf if config.gegelu_limit is None else config.gegelu_limit
        self.up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        both = self.up_proj(x)
        if wanted("gate", "up"):
            gate, up = at("gate", both[..., 0::2]), at("up", both[..., 1::2])
            both = mx.stack([gate, up], axis=-1).reshape(both.shape)
        return self.down_proj(at("act", gegelu(both, self._limit)))


class DecoderLayer(layer.DecoderLayer):
    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__(config, rope, index)
        self.self_attn = Attention(config, rope, index)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)


class Phi3SmallModel(decoder.Decoder):
    layer_type = DecoderLayer
    _config: Config

    def add_norm(self) -> None:
        self.final_layernorm = nn.LayerNorm(self._config.hidden_size, self._config.layer_norm_epsilon)

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm

    def embedded(self, rows: mx.array) -> mx.array:
        return rows * self._config.embedding_multiplier


class Model(decoder.Model):
    decoder_type = Phi3SmallModel
    _config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        dummy = np.isin(np.arange(config.vocab_size), _DUMMY_IDS)
        self._dummy = mx.array(dummy) if dummy.any() else None

    def head(self, hidden: mx.array) -> mx.array:
        """(..., hidden_size) -> (..., vocab_size), float32."""
        logits = super().head(hidden).astype(mx.float32) / self._config.width_multiplier
        return logits if self._dummy is None else mx.where(self._dummy, mx.finfo(mx.float32).min, logits)
