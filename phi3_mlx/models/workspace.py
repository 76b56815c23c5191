"""What a pass through the decoder holds beside weights and cache: its layers' arrays, and what each kernel adds.

Bytes are those at the peak. On the CPU MLX makes room for ten operations ahead of the one that runs, so more arrays are
alive than the code has names for.
"""

from __future__ import annotations

from .attention import attends_in_blocks, attention_bytes, decoding_bytes, unblocked_bytes
from .blocksparse import tile_bytes
from .cache import KVCache, kv_bytes
from .decoder import QUEUED
from .experts import expert_bytes, rows_bytes
from .linear import SLICE, dequantizes, most_dequantizing_bytes, slices_bytes
from .pass_shape import PassShape
from .rope import rotation_numbers

# How many arrays are alive at once on the CPU, each as wide as hidden states or as the MLP inside. They are fitted to
# the peaks of whole runs; behind each stands the run that it decides, a case of tests/test_plan.py (shapes) or of
# tests/test_plan_grid.py. All figures: bench/LOG.md, "One kernel at a time".
_LOGITS = 2  # of positions that are scored, in float32
_NORMS = 10  # hidden states in 16 bits, whose room the norms' copies in float32 take: wide hidden states in 16 bits
# Beside the slices of a matrix that is dequantized: shapes[2] in 8 bits.
_SLICED_HIDDEN, _SLICED_INNER = 3, 3.5
# While the products of its slices are joined, when half a slice fewer is alive: a wide feed-forward part of many rows.
_JOINED_INNER = 5
_FEWER = 2  # hidden and inside, where a layer at a time is computed, and queries, keys and values once: seed 10
# Of the feed-forward parts before and after, while queries are rotated: wide attention and inside.
_NEAR_HIDDEN, _NEAR_INNER = 5, 2.4


def workspace_bytes(shape: PassShape, step: int, scored: int = 0, drawing: int = 0) -> int:
    """Bytes that reading a chunk at the end of a sequence holds, and generating `step` tokens of all rows behind it.

    `scored`: at how many positions of the chunk there are logits at once. `drawing`: bytes of the logits of a step, and
    of what is made of them to draw its tokens.

    The largest of what is not alive together: layers, a layer's cache that grows, logits.
    """
    return max(_layers_bytes(shape), _growing_bytes(shape, step), _logits_bytes(shape, step, scored, drawing))


def _growing_bytes(shape: PassShape, step: int) -> int:
    """A layer's cache is copied when it last grows, while tokens are generated: then those are scored."""
    before = max(shape.length - KVCache.step, 0)
    return kv_bytes(shape.config, before, shape.bits, shape.itemsize) + decoding_bytes(shape, step)


def _logits_bytes(shape: PassShape, step: int, scored: int, drawing: int) -> int:
    """Logits (scored, vocab_size) or those of a step, and what of the output layer is dequantized for them."""
    config = shape.config
    logits = max(_LOGITS * 4 * scored * config.vocab_size, drawing)
    numbers = config.vocab_size * config.hidden_size
    if not dequantizes(max(step, scored), numbers, config.quantization, shape.itemsize, shape.fused_kernel):
        return logits
    return logits + slices_bytes(numbers, most_dequantizing_bytes(config.quantization, shape.itemsize))


def _layers_bytes(shape: PassShape) -> int:
    """Of a layer, or on a GPU of those that wait in its queue, whichever way it is computed."""
    if shape.config.experts_per_token > 1:
        return _mixture_bytes(shape)
    if _dequantizes(shape):
        return _dequantized_layer_bytes(shape)
    if attends_in_blocks(shape, shape.keys):
        return _layer_in_blocks_bytes(shape)
    return _queued_layers_bytes(shape)


def _dequantizes(shape: PassShape) -> bool:
    """Whether some weight of a layer is dequantized for all tokens."""
    config = shape.config
    return dequantizes(shape.tokens, config.largest_linear, config.quantization, shape.itemsize, shape.fused_kernel)


def _mixture_bytes(shape: PassShape) -> int:
    """A mixture of experts: rows of a token for each of its experts, and its MLPs begin when attention has left."""
    config, itemsize = shape.config, shape.itemsize
    rows = rows_bytes(shape.tokens, config.experts_per_token, config.hidden_size, itemsize)
    routed = shape.tokens * config.inner_in_work * itemsize
    if _dequantizes(shape):
        dequantizing = most_dequantizing_bytes(config.quantization, itemsize)
        routed += expert_bytes(config.largest_linear, dequantizing, itemsize)
    attention = _attention_bytes(shape)
    mixed = shape.tokens * config.mixing_in_work * itemsize + attention
    rotated = shape.tokens * _rotating_numbers(shape) * itemsize + attention  # before there are rows of experts
    return max(rows + max(routed, mixed), rotated)


def _dequantized_layer_bytes(shape: PassShape) -> int:
    """A layer at a time is computed: fewer arrays are alive at once, but slices of matrices are dequantized."""
    config, itemsize = shape.config, shape.itemsize
    dequantizing = most_dequantizing_bytes(config.quantization, itemsize)
    slices = slices_bytes(config.largest_linear, dequantizing)
    sliced = _SLICED_HIDDEN * config.hidden_size + int(_SLICED_INNER * config.mlp_width)
    wide = shape.tokens * sliced * itemsize + slices
    if config.largest_linear > SLICE:  # while the last of several is dequantized the parts of the product are joined
        joined = _SLICED_HIDDEN * config.hidden_size + _JOINED_INNER * config.mlp_width
        wide = max(wide, shape.tokens * joined * itemsize + slices - SLICE // 2 * dequantizing)
    fewer = _FEWER * (config.hidden_size + config.mlp_width) + config.qkv_width
    numbers = max(config.numbers_in_work + _norm_numbers(shape) - fewer, _rotating_numbers(shape))
    return max(shape.tokens * numbers * itemsize + _attention_bytes(shape), wide)


def _layer_in_blocks_bytes(shape: PassShape) -> int:
    """Attention in blocks is computed before the MLP is begun; that of the first chunks, with few keys, is not."""
    config = shape.config
    numbers = config.numbers_in_work + _norm_numbers(shape)
    inside = shape.tokens * (numbers - config.inner_in_work) * shape.itemsize + _attention_bytes(shape)
    whole = shape.tokens * max(numbers, _rotating_near_others(shape)) * shape.itemsize
    return max(whole + unblocked_bytes(shape, shape.keys), inside)


def _queued_layers_bytes(shape: PassShape) -> int:
    """A layer with its attention, and on a GPU the layers that its queue holds with it."""
    config = shape.config
    numbers = max(config.numbers_in_work + _norm_numbers(shape), _rotating_near_others(shape))
    layer = shape.tokens * numbers * shape.itemsize
    layers = min(config.num_hidden_layers, QUEUED // layer + 1) if shape.fused_kernel else 1
    return layers * layer + _attention_bytes(shape)


def _attention_bytes(shape: PassShape) -> int:
    """What a call of attention writes, the largest of the layers'."""
    config, pattern = shape.config, shape.config.sparse_layers
    if pattern is None or shape.length <= pattern.reach:
        return attention_bytes(shape, shape.keys)
    sparse = tile_bytes(shape, pattern)
    if any(map(config.is_dense, range(config.num_hidden_layers))):
        return max(attention_bytes(shape, shape.keys), sparse)
    # Up to the pattern's reach they are dense; what the cache takes more in the end was free then.
    now, then = (kv_bytes(config, length, shape.bits, shape.itemsize) for length in (shape.length, pattern.reach))
    later = config.num_hidden_layers * shape.rows * (now - then)
    return max(attention_bytes(shape, pattern.reach) - later, sparse)


def _norm_numbers(shape: PassShape) -> int:
    """Numbers of a token that the norms hold beside the others: on the CPU they copy 16-bit ones into float32."""
    return 0 if shape.fused_kernel or shape.itemsize == 4 else _NORMS * shape.config.hidden_size


def _rotating_numbers(shape: PassShape) -> int:
    """Numbers of a token while queries are rotated on the CPU: hidden states, queries, keys and values among them."""
    if shape.fused_kernel:
        return 0
    config = shape.config
    rotated = rotation_numbers(config.num_attention_heads * config.head_dim)
    return 2 * config.hidden_size + _norm_numbers(shape) + config.qkv_width + rotated


def _rotating_near_others(shape: PassShape) -> int:
    """The same where feed-forward parts before and after are computed without a wait."""
    config = shape.config
    near = _NEAR_HIDDEN * config.hidden_size + int(_NEAR_INNER * config.mlp_width)
    return 0 if shape.fused_kernel else _rotating_numbers(shape) + near
