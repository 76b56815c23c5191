"""From logits back to the residual stream: which directions they read, once the last norm's scale is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from ..models.decoder import Model


def one_hot(tokens: mx.array, size: int) -> mx.array:
    """Token ids (n,) -> (n, size): 1 at the token, float32."""
    return (tokens[:, None] == mx.arange(size)).astype(mx.float32)


def normed_directions(model: Model, weights: mx.array) -> mx.array:
    """What weighted sums of logits read of the last norm's output: weights (n, V) -> (n, d) in float32.

    It is the gradient of the model's own head, packed or not, with its scale.
    """
    nothing = mx.zeros((len(weights), model.config.hidden_size), model.dtype)
    _, (directions,) = mx.vjp(lambda normed: model.head(normed).astype(mx.float32), [nothing], [weights])
    return directions.astype(mx.float32)


def stream_directions(model: Model, directions: mx.array) -> mx.array:
    """What directions (n, d) of the last norm's output read of the stream, where `norm_scale` is 1."""
    return _centred(model, directions * model.model.final_norm.weight.astype(mx.float32))


def norm_scale(model: Model, stream: mx.array) -> mx.array:
    """By how much the last norm multiplies a stream: (..., d) -> (..., 1) in float32."""
    centred = _centred(model, stream.astype(mx.float32))
    return mx.rsqrt(mx.square(centred).mean(axis=-1, keepdims=True) + model.model.final_norm.eps)


def norm_bias(model: Model) -> mx.array:
    """What the last norm adds (d,), 0 where it has no bias; float32."""
    bias = model.model.final_norm.get("bias")
    return mx.zeros(model.config.hidden_size) if bias is None else bias.astype(mx.float32)


def head_directions(model: Model, layer: int, directions: mx.array) -> mx.array:
    """What directions (n, d) of the stream read of what each head of a layer gives: (n, H, D)."""
    output, width = model.layers[layer].self_attn.output, model.config.num_attention_heads * model.config.head_dim
    nothing = mx.zeros((len(directions), width), model.dtype)
    _, (read,) = mx.vjp(output, [nothing], [directions.astype(model.dtype)])
    return mx.unflatten(read.astype(mx.float32), -1, (-1, model.config.head_dim))


def _centred(model: Model, x: mx.array) -> mx.array:
    """A LayerNorm reads x without its mean, and so do directions through it; an RMSNorm reads x."""
    return x - x.mean(axis=-1, keepdims=True) if isinstance(model.model.final_norm, nn.LayerNorm) else x
