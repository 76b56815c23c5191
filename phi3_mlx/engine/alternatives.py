"""The likeliest tokens of a place in a text, whichever was taken there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

Alternatives = tuple[tuple[int, float], ...]  # ids and their natural log-probabilities, the likeliest first


class Likeliest:
    """The likeliest tokens of some places, perhaps not computed yet.

    logits (P, vocab_size) in float32, their log-normalizers (P,), and how many tokens of each place are wanted.
    """

    def __init__(self, logits: mx.array, normalizers: mx.array, counts: Sequence[int]):
        self._counts = list(counts)
        self.arrays: list[mx.array] = []  # ids and log-probabilities (places that want some, most)
        wanted = [place for place, count in enumerate(counts) if count]
        if not wanted:
            return
        if len(wanted) < len(self._counts):
            logits, normalizers = logits[mx.array(wanted)], normalizers[mx.array(wanted)]
        most = min(max(self._counts), logits.shape[-1])
        ids = mx.argpartition(-logits, kth=most - 1, axis=-1)[:, :most]
        values = mx.take_along_axis(logits, ids, axis=-1)
        order = mx.argsort(-values, axis=-1)
        ids, values = (mx.take_along_axis(array, order, axis=-1) for array in (ids, values))
        self.arrays = [ids, values - normalizers[:, None]]

    def told(self) -> list[Alternatives]:
        """Wait for them; of a place that wants none there are none."""
        ids, logprobs = [array.tolist() for array in self.arrays] or ([], [])
        pairs: Any = zip(ids, logprobs, strict=True)  # type: ignore[arg-type]
        return [tuple(zip(*next(pairs), strict=True))[:count] if count else () for count in self._counts]
