"""The bytes of the K types' blocks (github.com/ggml-org/ggml, ggml-common.h), of integers that are chosen already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _q4_k(q: np.ndarray, steps: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    return np.concatenate([_halves(d), _halves(dmin), _six_bits(steps, minima), _nibbles(q, 32)], axis=1)


def _q5_k(q: np.ndarray, steps: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    high = _bits_across(q >> 4, 1)
    return np.concatenate([_halves(d), _halves(dmin), _six_bits(steps, minima), high, _nibbles(q & 15, 32)], axis=1)


def _q2_k(q: np.ndarray, steps: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    return np.concatenate([steps | minima << 4, _bits_across(q, 2), _halves(d), _halves(dmin)], axis=1)


def _q3_k(q: np.ndarray, steps: np.ndarray, d: np.ndarray) -> np.ndarray:
    shifted = (q + 4).astype(np.uint8)
    return np.concatenate(
        [_bits_across(shifted >> 2, 1), _bits_across(shifted & 3, 2), _split_steps(steps + 32), _halves(d)], axis=1
    )


def _q6_k(q: np.ndarray, steps: np.ndarray, d: np.ndarray) -> np.ndarray:
    shifted = (q.astype(np.int16) + 32).astype(np.uint8)
    signed: Any = steps.astype(np.int8)
    return np.concatenate(
        [_nibbles(shifted & 15, 64), _bits_across(shifted >> 4, 2), signed.view(np.uint8), _halves(d)], axis=1
    )


# From q (n, 256), steps and minima (n, groups), d and dmin (n, 1) float16, to blocks (n, bytes).
PACKERS: dict[str, Callable[..., np.ndarray]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _halves(numbers: Any) -> np.ndarray:
    """float16 numbers (n, 1) as bytes (n, 2)."""
    result: np.ndarray = np.ascontiguousarray(numbers).view(np.uint8)
    return result


def _nibbles(q: np.ndarray, run: int) -> np.ndarray:
    """4 bits each: the first `run` of 2 * run values in the low halves of `run` bytes, the others in the high ones."""
    pairs = q.reshape(len(q), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(q), -1)


def _bits_across(q: np.ndarray, bits: int) -> np.ndarray:
    """`bits` each: byte i of 32 takes value i of every run of 32, the first run in its lowest bits."""
    runs = q.reshape(len(q), -1, 8 // bits, 32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    return np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(q), -1)


def _six_bits(steps: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight steps and eight minima of 6 bits in 12 bytes.

    The first four of each stand whole in bytes 0 to 7, beside the upper two bits of the last four, whose lower four
    bits share bytes 8 to 11.
    """
    first_steps, last_steps = steps[:, :4], steps[:, 4:]
    first_minima, last_minima = minima[:, :4], minima[:, 4:]
    return np.concatenate(
        [
            first_steps | last_steps >> 4 << 6,
            first_minima | last_minima >> 4 << 6,
            last_steps & 15 | (last_minima & 15) << 4,
        ],
        axis=1,
    )


def _split_steps(steps: np.ndarray) -> np.ndarray:
    """Sixteen steps of 6 bits in 12 bytes: lower four bits of two in a byte, then upper two bits of four in a byte."""
    steps = steps.astype(np.uint8)
    low = steps[:, :8] & 15 | (steps[:, 8:] & 15) << 4
    upper = (steps >> 4).reshape(len(steps), 4, 4)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    return np.concatenate([low, np.bitwise_or.reduce(upper << shifts, axis=1)], axis=1)
