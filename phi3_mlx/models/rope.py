"""Rotary position embedding with LongRoPE's two regimes.

Pairing is "rotate half" over the first `rotary_dim` dims of a head; angles are float32. The attention factor m
multiplies cos and sin of queries and keys, so a score's rotated part grows by m^2: it is applied once, to the
query, and where the whole head is rotated it costs nothing because it joins the softmax scale.
Source: transformers `modeling_rope_utils._compute_longrope_parameters`, `modeling_phi3`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..config import Config

# Halves of queries that are alive at once on the CPU, where MLX rotates them in ten operations: fitted to the peaks of
# "wide attention" of tests/test_plan_grid.py (bench/LOG.md, "One kernel at a time").
_HALVES = 11
# Whether the regime is the long one: for all rows, or for each.
Regime = bool | tuple[bool, ...]


class Rope:
    """Rotates queries and keys. Not a module: it holds no weights, and is shared by all layers."""

    def __init__(self, config: Config):
        self.dims = config.rotary_dim
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        # numpy's float32 power is off in the last bit for a quarter of them, and position 4,096 multiplies that.
        periods = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
        longrope = config.longrope
        short = np.array(longrope.short_factor if longrope else 1.0, dtype=np.float32)
        long = np.array(longrope.long_factor if longrope else 1.0, dtype=np.float32)
        self._freqs = (mx.array(short * periods), mx.array(long * periods))
        gains = (longrope.short_mscale**2, longrope.long_mscale**2) if longrope else (1.0, 1.0)
        # The softmax scale takes the short regime's gain if that is for all numbers of a head.
        folded = gains[0] if self.dims == config.head_dim else 1.0
        self.scale: float = config.softmax_scale * folded
        rotated = np.arange(config.head_dim) < self.dims
        # By regime, what is left to multiply queries by; None: the softmax scale has it all.
        self._query_gains = [
            None if gain == folded else mx.array(np.where(rotated, gain / folded, 1.0).astype(np.float32))
            for gain in gains
        ]

    def rotate(self, x: mx.array, offset: int | mx.array, long: Regime) -> mx.array:
        """Rotate queries and keys (B, any heads, L, D) whose first position is `offset` (an int, or one a row).

        Queries must go through `gain` as well.
        """
        return self._by_regime(lambda long: self._rotate(x, offset, long), long)

    def turns(self, offsets: Sequence[int], long: Sequence[bool]) -> list[mx.array] | None:
        """What `turned` and `gained` ask for one token a row at these positions, as arrays; the same in every layer.

        On the CPU, where MLX writes rotation out, cosines and sines (B, 1, 1, dims / 2), else positions and periods.
        None: rows of both regimes on a GPU.
        """
        alike = len(set(long)) == 1
        positions = mx.array([*offsets])
        if _on_gpu():
            if not alike:
                return None
            turns = [positions, self._freqs[long[0]]]
        else:
            periods = self._freqs[long[0]] if alike else mx.stack([self._freqs[regime] for regime in long])
            angles = (positions[:, None] * mx.reciprocal(periods))[:, None, None]
            turns = [mx.cos(angles), mx.sin(angles)]
        if any(gain is not None for gain in self._query_gains):
            gains = [mx.array(1.0) if gain is None else gain for gain in self._query_gains]
            turns.append(self._by_regime(gains.__getitem__, tuple(long)))
        return turns

    def turned(self, x: mx.array, turns: list[mx.array]) -> mx.array:
        """`rotate` of x (B, any heads, 1, D)."""
        first, second = turns[:2]
        if _on_gpu():
            return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=first, freqs=second)
        cosines, sines = first.astype(x.dtype), second.astype(x.dtype)  # as MLX has them there
        half, others = self.dims // 2, [self.dims] if self.dims < x.shape[-1] else []
        a, b, *rest = mx.split(x, [half, *others], axis=-1)
        return mx.concatenate([a * cosines - b * sines, a * sines + b * cosines, *rest], axis=-1)

    def gained(self, queries: mx.array, turns: list[mx.array]) -> mx.array:
        """`gain` of rotated queries (B, H, 1, D)."""
        return queries * turns[2].astype(queries.dtype) if len(turns) > 2 else queries

    def gain(self, queries: mx.array, long: Regime) -> mx.array:
        """Multiply rotated queries (B, H, L, D) by m^2, unless the softmax scale already has it."""
        if all(gain is None for gain in self._query_gains):
            return queries
        return self._by_regime(lambda long: self._gain(queries, long), long)

    def _by_regime(self, compute: Callable[[bool], mx.array], long: Regime) -> mx.array:
        """`compute(regime)`, whose rows (B, ...) are those of each row's own regime."""
        if isinstance(long, bool):
            return compute(long)
        if len(set(long)) == 1:
            return compute(long[0])
        rows = mx.array(long)[:, None, None, None]  # (B, 1, 1, 1)
        return mx.where(rows, compute(True), compute(False))

    def _gain(self, queries: mx.array, long: bool) -> mx.array:
        gain = self._query_gains[long]
        return queries if gain is None else queries * gain.astype(queries.dtype)

    def _rotate(self, x: mx.array, offset: int | mx.array, long: bool) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs[long]
        )


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def rotation_numbers(width: int) -> int:
    """Numbers of a token that rotating `width` numbers of queries holds on the CPU, beside the queries themselves."""
    return _HALVES * width // 2
