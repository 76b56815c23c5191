"""A decoder layer and its attention: what the members of the family share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from .attention import Mask, attend, fetched
from .cache import KVCache
from .dropout import dropped
from .end_to_end import EndToEnd
from .hooks import at, beside, turn_to, wanted
from .probabilities import probabilities, weighed
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

    def attend(self, q: mx.array, seen: list[mx.array], cache: KVCache | None, mask: Mask) -> mx.array:
        """Rotated q (B, H, L, D), and what `fetched` gives of rotated keys and values -> (B, L, H * D)."""
        return attend(q, seen, cache, self._rope.scale, mask)

    def visible(self, mask: Mask, queries: int, keys: int, padding: Sequence[int]) -> Mask:
        """Which of `keys` keys the last `queries` tokens see: `mask`, or an array for each head (B, H, L, S)."""
        return mask

    def mixed(self, q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None, mask: Mask) -> mx.array:
        """Rotated q (B, H, L, D), rotated k and v (B, Hkv, L, D) -> the values that each head mixes (B, L, H * D)."""
        seen = fetched(k, v, cache)
        mixed = self.attend(q, seen, cache, mask)
        return self._watched(mixed, q, seen, cache, mask) if wanted("pattern", "z") else mixed

    def _watched(
        self, mixed: mx.array, q: mx.array, seen: list[mx.array], cache: KVCache | None, mask: Mask
    ) -> mx.array:
        """`mixed` with the changes of probabilities, which are computed beside it, and of the heads' outputs."""
        padding = (None if cache is None else cache.sequence.left_padding) or (0,) * len(q)
        bits, keys = None if cache is None else cache.bits, seen[0].shape[2]

        def pattern(heads: Sequence[int] | None, places: Sequence[int] | None) -> mx.array:
            visible = self.visible(mask, q.shape[2], keys, padding)
            return probabilities(q, seen, bits, self._rope.scale, visible, heads, places).swapaxes(1, 2)

        change = beside("pattern", pattern, len(q))
        if change is not None:
            added = weighed(change.swapaxes(1, 2).astype(q.dtype), seen, bits)  # (B, H, L, D)
            mixed = mixed + added.swapaxes(1, 2).reshape(mixed.shape)
        return at("z", mx.unflatten(mixed, -1, (self._heads, self._dim))).reshape(mixed.shape)

    def projected(self, mixed: mx.array) -> mx.array:
        """`output`, with the changes of what each head contributes."""
        output = self.output(mixed)
        if not wanted("head_out"):
            return output
        by_head = mx.unflatten(mixed, -1, (self._heads, self._dim))

        def contributions(heads: Sequence[int] | None, places: Sequence[int] | None) -> mx.array:
            z = by_head if places is None else by_head[:, mx.array([*places])]
            nothing = self.output(mx.zeros_like(z[:1, :1].reshape(1, 1, -1)))  # the bias, where there is one
            each = []
            for head in range(self._heads) if heads is None else heads:
                alone = mx.where((mx.arange(self._heads) == head)[:, None], z, mx.zeros_like(z))
                each.append(self.output(alone.reshape(*z.shape[:2], -1)) - nothing)
            return mx.stack(each, axis=2)  # (B, L, H, hidden_size)

        change = beside("head_out", contributions, len(mixed))
        return output if change is None else output + change.sum(axis=2)

    def attend_each(self, q: mx.array, k: mx.array, v: mx.array, units: Sequence[Unit], index: int) -> list[mx.array]:
        """`attend` of the rows of each unit, which stand in this order, in layer `index`."""
        if len(units) == 1:
            return [self._attend_unit(q, k, v, units[0], index)]
        *cuts, _ = accumulate(len(unit.rows) for unit in units)
        each = zip(*(mx.split(array, cuts) for array in (q, k, v)), units, strict=True)
        return [self._attend_unit(q, k, v, unit, index) for q, k, v, unit in each]

    def _attend_unit(self, q: mx.array, k: mx.array, v: mx.array, unit: Unit, index: int) -> mx.array:
        if unit.resting is None:
            return self.mixed(q, k, v, unit.layers[index], unit.mask)
        standing, places = unit.resting
        return self.mixed(q[standing], k[standing], v[standing], unit.layers[index], unit.mask)[places]

    def __call__(
        self, x: mx.array, mask: Mask, cache: KVCache | None, offset: int | mx.array, long: Regime
    ) -> mx.array:
        return self.projected(self._attended(self.qkv(x), mask, cache, offset, long))

    def end_to_end(self, x: mx.array, joined: EndToEnd) -> mx.array:
        """Sequences end to end (1, L, hidden_size), each of which attends to itself alone."""
        qkv = self.qkv(x)
        blocks = [self._attended(block.gather(qkv), block.mask, None, 0, block.long) for block in joined.blocks]
        return self.output(joined.scatter(blocks))

    def together(self, x: mx.array, joint: Together, newest: bool) -> mx.array:
        """Sequences with caches of their own, side by side (1, L, hidden_size); of all tokens or each one's newest."""
        mixed = []
        for i, (block, qkv) in enumerate(zip(joint.blocks, joint.apart(self.qkv(x)), strict=True)):
            turn_to(i)  # where somebody looks on, each sequence is a block
            q, k, v = self._rotated(qkv, block.offset, block.long)
            units = block.newest if newest else block.units
            mixed += self.attend_each(q[:, :, -1:] if newest else q, k, v, units, self._index)
        turn_to(None)
        return self.projected(joint.joined(mixed))

    def _attended(
        self, qkv: mx.array, mask: Mask, cache: KVCache | None, offset: int | mx.array, long: Regime
    ) -> mx.array:
        """The output of `qkv`, whose first position is `offset` -> (B, L, H * D)."""
        q, k, v = self._rotated(qkv, offset, long)
        return self.mixed(q, k, v, cache, mask)

    def _rotated(self, qkv: mx.array, offset: int | mx.array, long: Regime) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries and keys, and values, of `qkv`, whose first position is `offset`."""

        def rotate(x: mx.array) -> mx.array:
            return self._rope.rotate(x, offset, long)

        if not wanted("q", "k", "v", "q_rot", "k_rot"):
            q, k, v = self.split(qkv, rotate)
            return self._rope.gain(q, long), k, v
        q, k, v = self.split(qkv, lambda x: x)
        q, k, v = _by_token("q", q), _by_token("k", k), _by_token("v", v)
        return _by_token("q_rot", self._rope.gain(rotate(q), long)), _by_token("k_rot", rotate(k)), v


def _by_token(place: str, x: mx.array) -> mx.array:
    """`at` of x (B, heads, L, D), which is kept as (B, L, heads, D)."""
    kept = x.swapaxes(1, 2)
    changed = at(place, kept)
    # As it was in memory: MLX's CPU backend rounds otherwise where the strides are others.
    return x if changed is kept else mx.contiguous(changed.swapaxes(1, 2))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). A member makes the parts; names are the checkpoint's."""

    self_attn: Attention
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    residual_dropout: float = 0.0  # in training, the share that is dropped of what either part adds

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
        x = at("resid_pre", x)
        return self._fed(x, self.self_attn(self._first_normed(x), mask, cache, offset, long))

    def after_attention(self, x: mx.array, mixed: mx.array) -> mx.array:
        """The layer's output, of its input and what its heads have mixed of that already (B, L, H * D)."""
        return self._fed(x, self.self_attn.projected(mixed))

    def _first_normed(self, x: mx.array) -> mx.array:
        return at("attn_norm", self.input_layernorm(at("attn_in", x)))

    def _fed(self, x: mx.array, mixed: mx.array) -> mx.array:
        """What follows attention, whose output is `mixed`."""
        x = at("resid_mid", x + at("attn_out", mixed))
        normed = at("mlp_norm", self.post_attention_layernorm(at("mlp_in", x)))
        return at("resid_post", x + at("mlp_out", self.feed_forward(normed)))

    def end_to_end(self, x: mx.array, joined: EndToEnd) -> mx.array:
        x = x + self._kept(self.self_attn.end_to_end(self.input_layernorm(x), joined))
        return x + self._kept(self.feed_forward(self.post_attention_layernorm(x)))

    def _kept(self, added: mx.array) -> mx.array:
        return dropped(added, self.residual_dropout) if self.training and self.residual_dropout else added

    def together(self, x: mx.array, joint: Together, newest: bool) -> mx.array:
        x = at("resid_pre", x)
        mixed = self.self_attn.together(self._first_normed(x), joint, newest)
        return self._fed(joint.newest(x) if newest else x, mixed)
