"""A decoder layer and its attention: what the members of the family share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from .attention import Mask, attend
from .cache import KVCache
from .end_to_end import EndToEnd
from .rope import Regime, Rope
from .slots import Unit
from .together import Together

_ROTATED_TOGETHER = 32  # queries and keys of at most this many tokens are rotated in one call


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """What most members do to the two halves of their feed-forward part."""
    return nn.silu(gate) * up


class Attention(nn.Module):
    """Self-attention. A member defines the projections: `qkv`, `split` and `output`."""

    def __init__(self, config: Config, rope: Rope, index: int):
        super().__init__()
        self._rope, self._index = rope, index
        self._heads, self._kv_heads, self._dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )

    def qkv(self, x: mx.array) -> mx.array:
        """Queries, keys and values of every token side by side: (B, L, hidden_size) -> (B, L, (H + 2 Hkv) * D)."""
        raise NotImplementedError

    def split(self, qkv: mx.array, rotate: Callable[[mx.array], mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """The output of `qkv` -> rotated queries (B, H, L, D) and keys, and values (B, Hkv, L, D); here in that order.

        A call of `rotate` takes Python as long as several other operations, so queries and keys of a few tokens are
        rotated in one. On the CPU it needs several times the memory of what it rotates, so those of many are not.
        """
        batch, length, _ = qkv.shape
        qkv = qkv.reshape(batch, length, -1, self._dim).transpose(0, 2, 1, 3)  # (B, H + 2 Hkv, L, D)
        if length > _ROTATED_TOGETHER:
            q, k, v = mx.split(qkv, [self._heads, self._heads + self._kv_heads], axis=1)
            return rotate(q), rotate(k), v
        qk, v = mx.split(qkv, [self._heads + self._kv_heads], axis=1)
        q, k = mx.split(rotate(qk), [self._heads], axis=1)
        return q, k, v

    def output(self, x: mx.array) -> mx.array:
        """The output projection of all heads: (B, L, H * D) -> (B, L, hidden_size)."""
        raise NotImplementedError

    def attend(self, q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None, mask: Mask) -> mx.array:
        """Rotated q (B, H, L, D), rotated k and v (B, Hkv, L, D) -> (B, L, H * D)."""
        return attend(q, k, v, cache, self._rope.scale, mask)

    def attend_each(self, q: mx.array, k: mx.array, v: mx.array, units: Sequence[Unit], index: int) -> list[mx.array]:
        """`attend` of the rows of each unit, which stand in this order, in layer `index`."""
        if len(units) == 1:
            return [self.attend(q, k, v, units[0].layers[index], units[0].mask)]
        *cuts, _ = accumulate(len(unit.rows) for unit in units)
        each = zip(*(mx.split(array, cuts) for array in (q, k, v)), units, strict=True)
        return [self.attend(q, k, v, unit.layers[index], unit.mask) for q, k, v, unit in each]

    def __call__(
        self, x: mx.array, mask: Mask, cache: KVCache | None, offset: int | mx.array, long: Regime
    ) -> mx.array:
        return self.output(self._attended(self.qkv(x), mask, cache, offset, long))

    def end_to_end(self, x: mx.array, joined: EndToEnd) -> mx.array:
        """Sequences end to end (1, L, hidden_size), each of which attends to itself alone."""
        qkv = self.qkv(x)
        blocks = [self._attended(block.gather(qkv), block.mask, None, 0, block.long) for block in joined.blocks]
        return self.output(joined.scatter(blocks))

    def together(self, x: mx.array, joint: Together, newest: bool) -> mx.array:
        """Sequences with caches of their own, side by side (1, L, hidden_size); of all tokens or each one's newest."""
        mixed = []
        for block, qkv in zip(joint.blocks, joint.apart(self.qkv(x)), strict=True):
            q, k, v = self._rotated(qkv, block.offset, block.long)
            units = block.newest if newest else block.units
            mixed += self.attend_each(q[:, :, -1:] if newest else q, k, v, units, self._index)
        return self.output(joint.joined(mixed))

    def _attended(
        self, qkv: mx.array, mask: Mask, cache: KVCache | None, offset: int | mx.array, long: Regime
    ) -> mx.array:
        """The output of `qkv`, whose first position is `offset` -> (B, L, H * D)."""
        q, k, v = self._rotated(qkv, offset, long)
        return self.attend(q, k, v, cache, mask)

    def _rotated(self, qkv: mx.array, offset: int | mx.array, long: Regime) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries and keys, and values, of `qkv`, whose first position is `offset`."""
        q, k, v = self.split(qkv, lambda x: self._rope.rotate(x, offset, long))
        return self._rope.gain(q, long), k, v


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). A member makes the parts; names are the checkpoint's."""

    self_attn: Attention
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, config: Any, rope: Rope, index: int):
        super().__init__()

    def feed_forward(self, x: mx.array) -> mx.array:
        return self.mlp(x)

    def waits(self, tokens: int) -> bool:
        """Whether `feed_forward` of this many tokens waits for numbers, so that it cannot be compiled."""
        return False

    def __call__(
        self, x: mx.array, mask: Mask, cache: KVCache | None, offset: int | mx.array, long: Regime
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache, offset, long)
        return x + self.feed_forward(self.post_attention_layernorm(x))

    def end_to_end(self, x: mx.array, joined: EndToEnd) -> mx.array:
        x = x + self.self_attn.end_to_end(self.input_layernorm(x), joined)
        return x + self.feed_forward(self.post_attention_layernorm(x))

    def together(self, x: mx.array, joint: Together, newest: bool) -> mx.array:
        mixed = self.self_attn.together(self.input_layernorm(x), joint, newest)
        x = (joint.newest(x) if newest else x) + mixed
        return x + self.feed_forward(self.post_attention_layernorm(x))
