"""Packed weights of MLX that a GGUF type can hold, so that nothing is rounded a second time.

MLX's affine values are scale * q + bias, q from 0, a scale and a bias for 32, 64 or 128 of them. GGUF's blocks have 32
values: Q4_1 and Q5_1 store scale and offset in float16, Q4_0, Q5_0 and Q8_0 a scale alone, their q counted from -8, -16
and -128. A group of 64 is two blocks that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..sources import Blocks

_WITH_OFFSET = {"Q4_1": 4, "Q5_1": 5}  # how many bits their q has
_SCALE_ALONE = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_VALUES_AT_ONCE = 1 << 20


class Carrier:
    """A tensor's packed weights, opened: what a type would cost, and the bytes."""

    def __init__(self, blocks: Blocks):
        self.bits, self._group = blocks.packing["bits"], blocks.packing["group_size"]
        self._weight, *scales = blocks.read()
        self._scales, self._offsets = (np.array(array.astype(mx.float32)) for array in scales)

    def holds(self, kind: str) -> bool:
        """Whether the type `kind` has a place for these q, its scales rounded to float16 at most."""
        with np.errstate(over="ignore"):
            finite = (
                np.isfinite(self._scales.astype(np.float16)).all()
                and np.isfinite(self._offsets.astype(np.float16)).all()
            )
        if kind in _WITH_OFFSET:
            return bool(finite) and self.bits <= _WITH_OFFSET[kind]
        return (
            bool(finite)
            and self.bits == _SCALE_ALONE.get(kind)
            and np.array_equal(self._offsets, self._scales * -np.float32(1 << (self.bits - 1)))
        )

    def rounded_scales(self) -> int:
        """How many scales and offsets are not float16 numbers, in which GGUF stores them."""
        return sum(int((numbers.astype(np.float16) != numbers).sum()) for numbers in (self._scales, self._offsets))

    def rows(self, kind: str) -> Iterator[np.ndarray]:
        """The bytes of a type that `holds` them, some rows (all experts' one after the other) at a time."""
        weight = self._weight.reshape(-1, self._weight.shape[-1])
        scales = self._scales.reshape(len(weight), -1)
        offsets = self._offsets.reshape(len(weight), -1)
        step = max(1, _VALUES_AT_ONCE // (scales.shape[-1] * self._group))
        for first in range(0, len(weight), step):
            part = slice(first, first + step)
            ones = mx.ones(scales[part].shape)
            q = mx.dequantize(weight[part], ones, mx.zeros_like(ones), self._group, self.bits)
            times = self._group // 32
            yield _encoded(
                np.array(q.astype(mx.uint8)).reshape(-1, 32),
                np.repeat(scales[part].reshape(-1), times),
                np.repeat(offsets[part].reshape(-1), times),
                kind,
            )


def _encoded(q: np.ndarray, scales: np.ndarray, offsets: np.ndarray, kind: str) -> np.ndarray:
    """Blocks (n, bytes a block) of q (n, 32) from 0."""
    parts = [_float16_bytes(scales)]
    if kind in _WITH_OFFSET:
        parts.append(_float16_bytes(offsets))
    if kind == "Q8_0":
        return np.concatenate([*parts, q ^ 0x80], axis=1)
    if kind in ("Q5_0", "Q5_1"):
        parts.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    return np.concatenate([*parts, (q[:, :16] & 15) | (q[:, 16:] & 15) << 4], axis=1)


def _float16_bytes(numbers: np.ndarray) -> np.ndarray:
    halves: Any = numbers.astype(np.float16)[:, None]
    return halves.view(np.uint8)
