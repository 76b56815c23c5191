"""Rows of floats in the types of GGUF: the bytes of F32, F16, BF16, and of blocks with scales."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from .kquants import K_TYPES, k_blocks

_FLOAT16_MOST = float(np.finfo(np.float16).max)
_VALUES_A_CHUNK = 1 << 20  # numbers rounded at a time


def rows_a_chunk(width: int) -> int:
    return max(1, _VALUES_A_CHUNK // width)


def encoded_rows(
    gguf: ModuleType, rows: mx.array, kind: str, name: str, importance: mx.array | None = None
) -> np.ndarray:
    """Rows of floats (n, width) as bytes of the type `kind`, flat. `gguf` is the library.

    `importance` (n, width) says how much an error counts, to K types.

    Raises CheckpointError, naming the tensor by `name`, for values that are not finite or that the type cannot hold.
    """
    values = np.array(rows.astype(mx.float32))
    most = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(most):
        raise CheckpointError(
            f"{name} is not finite (NaN or infinity), and is not exported; convert the original again"
        )
    if kind not in ("F32", "BF16") and most > _FLOAT16_MOST:
        raise CheckpointError(f"{name} has values beyond what float16 holds ({most:.3g}); take type='bf16' or 'f32'")
    if kind == "BF16" and rows.dtype == mx.bfloat16:
        return np.array(rows.view(mx.uint16)).view(np.uint8).reshape(-1)
    if kind in K_TYPES:
        return k_blocks(rows, kind, importance).reshape(-1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # 1 / scale of a block of tiny values
        encoded = gguf.quantize(values.reshape(1, -1), gguf.GGMLQuantizationType[kind])
    return encoded.view(np.uint8).reshape(-1)
