"""Whether an array has NaN or infinity in it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

# For each type: its bits as unsigned and as signed integers, and what infinity is among those.
_INFINITY: dict[mx.Dtype, tuple[mx.Dtype, type[np.signedinteger[Any]], int]] = {
    mx.bfloat16: (mx.uint16, np.int16, 0x7F80),
    mx.float16: (mx.uint16, np.int16, 0x7C00),
    mx.float32: (mx.uint32, np.int32, 0x7F800000),
}


def is_finite(array: mx.array) -> bool:
    """Whether no value of a floating array is NaN or infinite."""
    if array.dtype not in _INFINITY:
        return bool(mx.all(mx.isfinite(array)).item())
    unsigned, signed, infinity = _INFINITY[array.dtype]
    # Read as integers, infinity and NaN are above every finite number of their sign. So two maxima tell, which need no
    # memory and are many times faster than mlx's isfinite on the CPU.
    bits = np.array(array.view(unsigned), copy=False)
    sign = infinity + (1 << (8 * bits.itemsize - 1))
    return bits.size == 0 or bool(bits.view(signed).max() < infinity and bits.max() < sign)
