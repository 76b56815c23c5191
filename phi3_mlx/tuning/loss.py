"""The loss of a part of a batch: float32, and only where a token is trained.

The output layer runs on those places alone and a few hundred at a time: with 32,000 or 200,000 entries a place its
logits would be the largest thing in memory. Their gradient is as simple as the loss (probabilities, less one at the
target), so in training it is taken while they are there, and the backward pass need not compute them again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.decoder import Model
from ..models.dropout import Draws
from .batches import Part

CHUNK_LOGITS = 1 << 22  # entries, 16 MB; MLX's CPU backend allocates some pieces ahead, so that there are several
_ROWS = 64  # at least, since a packed output layer may be dequantized for every piece


def part_loss(model: Model, part: Part, *, checkpoint: bool = False, keys: mx.array | None = None) -> mx.array:
    """The sum of -log p over the part's trained tokens, float32; `checkpoint` and `keys`: see `Decoder.end_to_end`.

    The mean over a batch is taken behind the backward pass: 1 / tokens in front of it would push gradients of 16 bits
    below what float16 can hold.
    """
    hidden = model.model.end_to_end(part.ids, part.lengths, checkpoint=checkpoint, keys=keys)[0]
    return summed_loss(model, hidden[part.places], part.targets, None if keys is None else keys[part.places])


def summed_loss(model: Model, hidden: mx.array, targets: mx.array, keys: mx.array | None = None) -> mx.array:
    """The sum of -log p of `targets` (N,) after hidden states (N, hidden_size), float32.

    `keys` (N, 2) say what dropout of an adapter on the output layer draws, as `Decoder.end_to_end` has them.
    """
    step = places_at_once(model.config.vocab_size)
    pieces = [slice(i, i + step) for i in range(0, targets.size, step)]
    head: nn.Module = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    learnt: dict[str, mx.array] = dict(tree_flatten(head.trainable_parameters()))  # none but in full fine-tuning

    def logits_of(draws: Draws, rows: mx.array, *parameters: mx.array) -> mx.array:
        head.update(tree_unflatten(list(zip(learnt, parameters, strict=True))))
        with draws.within(model.config.num_hidden_layers):
            return model.logits(rows)

    # Every piece waits for the one before it: MLX would else be free to hold the logits of all.
    @mx.custom_function
    def loss(hidden: mx.array, *parameters: mx.array) -> tuple[mx.array, ...]:
        total, sums = mx.array(0.0), [mx.zeros(parameter.shape) for parameter in parameters]
        by_rows: list[mx.array] = []
        for span in pieces:
            before = by_rows[-1] if by_rows and model.training else total
            (rows,) = mx.depends([hidden[span]], [before])
            draws = Draws(None if keys is None else keys[span])  # the same in both passes
            part, gradients = _piece(partial(logits_of, draws), [rows, *parameters], targets[span])
            total = total + part
            by_rows.append(gradients[0])
            sums = [sum_ + more for sum_, more in zip(sums, gradients[1:], strict=True)]
        return total, mx.concatenate(by_rows) if by_rows else mx.zeros_like(hidden), *sums

    @loss.vjp
    def loss_vjp(_: Any, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        given = (hidden, *learnt.values())
        return tuple((slope * cotangents[0]).astype(a.dtype) for slope, a in zip(outputs[1:], given, strict=True))

    outputs: Any = loss(hidden, *learnt.values())
    head.update(tree_unflatten(list(learnt.items())))
    total: mx.array = outputs[0]
    return total


def places_at_once(vocab_size: int) -> int:
    """How many places the output layer treats at a time."""
    return max(_ROWS, CHUNK_LOGITS // vocab_size)


def _piece(logits_of: Callable[..., mx.array], inputs: list[mx.array], targets: mx.array) -> Any:
    """(sum of -log p, its gradients by `inputs`: rows and parameters)"""
    computed = logits_of(*inputs)
    logits, places = computed.astype(mx.float32), mx.arange(targets.size)
    loss = mx.sum(mx.logsumexp(logits, axis=-1) - logits[places, targets])
    (logits,) = mx.depends([logits], [loss])
    slopes = mx.softmax(logits, axis=-1).at[places, targets].add(-1.0)
    return loss, mx.vjp(logits_of, inputs, [slopes.astype(computed.dtype)])[1]
