"""The loss of a part of a batch: float32, and only where a token is trained.

The output layer runs on those places alone, a few hundred at a time, and its logits are computed again in the backward
pass: with 32,000 or 200,000 entries a place they would be the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.phi3 import Model
from .batches import Part

LOGITS_AT_ONCE = 1 << 24  # entries at a time, 64 MB


def part_loss(model: Model, part: Part, total: int, *, checkpoint: bool = False) -> mx.array:
    """The sum of -log p over the part's trained tokens, divided by `total`: parts of a batch add up to its mean."""
    hidden = model.model.packed(part.ids, part.lengths, checkpoint=checkpoint)[0]
    return summed_loss(model, hidden[part.places], part.targets) / total


def summed_loss(model: Model, hidden: mx.array, targets: mx.array) -> mx.array:
    """The sum of -log p of `targets` (N,) after hidden states (N, hidden_size), float32."""
    head: nn.Module = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head

    def loss(rows: mx.array, expected: mx.array) -> mx.array:
        logits = model.logits(rows).astype(mx.float32)
        # The checkpoint differentiates all it is given, and ids have no gradient.
        chosen = mx.take_along_axis(logits, mx.stop_gradient(expected)[:, None], axis=-1)[:, 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - chosen)

    again: Callable[..., mx.array] = nn.utils.checkpoint(head, loss)
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    pieces = [again(hidden[i : i + step], targets[i : i + step]) for i in range(0, hidden.shape[0], step)]
    return mx.sum(mx.stack(pieces)) if pieces else mx.array(0.0)


def number(array: mx.array) -> float:
    """The value of a scalar array."""
    value: Any = array.item()
    return float(value)
