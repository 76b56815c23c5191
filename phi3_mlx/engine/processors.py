"""What changes logits before a token is drawn: a bias, a constraint, or a caller's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import mlx.core as mx


class Processor(Protocol):
    """Changes the logits of one row.

    `reads_answer`: whether it looks at the answer so far. If not, its token is drawn before the one before is known,
    so the device never waits for Python. An exception ends its job alone.
    """

    reads_answer: bool

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        """`answer`: the ids drawn so far. logits (vocab_size,), float32 -> the same, changed; -inf excludes an id."""
        ...


class Bias:
    """Adds a number to the logits of some ids."""

    reads_answer = False

    def __init__(self, bias: Mapping[int, float]):
        self._ids = mx.array(list(bias), dtype=mx.int32)
        self._values = mx.array(list(bias.values()), dtype=mx.float32)

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        return logits.at[self._ids].add(self._values)
