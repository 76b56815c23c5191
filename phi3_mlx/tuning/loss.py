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
from ..models.normalizer import log_normalizer, softmax_with
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


def log_probs(model: Model, part: Part, *, checkpoint: bool = False, keys: mx.array | None = None) -> mx.array:
    """log p of each of the part's trained tokens, float32 (N,); `checkpoint` and `keys`: see `Decoder.end_to_end`."""
    hidden = model.model.end_to_end(part.ids, part.lengths, checkpoint=checkpoint, keys=keys)[0]
    return _log_probs(model, hidden[part.places], part.targets)


def _log_probs(model: Model, hidden: mx.array, targets: mx.array) -> mx.array:
    """log p of `targets` (N,) after hidden states (N, hidden_size), float32 (N,).

    As in `summed_loss` the gradients by hidden states are taken while the logits are there. What each weighs is known
    in the backward pass alone, so those of an output layer that is trained cost computing its logits again.
    """
    step = places_at_once(model.config.vocab_size)
    pieces = [slice(i, i + step) for i in range(0, targets.size, step)]
    head: nn.Module = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    learnt: dict[str, mx.array] = dict(tree_flatten(head.trainable_parameters()))

    def logits_of(rows: mx.array, *parameters: mx.array) -> mx.array:
        head.update(tree_unflatten(list(zip(learnt, parameters, strict=True))))
        return model.logits(rows)

    @mx.custom_function
    def scores(hidden: mx.array, *parameters: mx.array) -> tuple[mx.array, mx.array]:
        values: list[mx.array] = []
        slopes: list[mx.array] = []
        for span in pieces:
            before = slopes[-1:] if model.training else values[-1:]
            (rows,) = mx.depends([hidden[span]], before) if before else (hidden[span],)
            value, gradients = _piece(lambda r: logits_of(r, *parameters), [rows], targets[span], by_place=True)
            values.append(-value)
            slopes.append(-gradients[0])
        return mx.concatenate(values), mx.concatenate(slopes)

    @scores.vjp
    def scores_vjp(given: Any, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        rows, *parameters = given if isinstance(given, (tuple, list)) else (given,)
        weights = cotangents[0]
        sums = [mx.zeros(parameter.shape) for parameter in parameters]
        for span in pieces if parameters else ():
            (some,) = mx.depends([rows[span]], sums)
            _, gradients = _piece(logits_of, [some, *parameters], targets[span], weights=-weights[span])
            sums = [sum_ + more for sum_, more in zip(sums, gradients[1:], strict=True)]
        slopes = (outputs[1] * weights[:, None]).astype(rows.dtype)
        return slopes, *(sum_.astype(a.dtype) for sum_, a in zip(sums, parameters, strict=True))

    outputs: Any = scores(hidden, *learnt.values())
    values: mx.array = outputs[0]
    head.update(tree_unflatten(list(learnt.items())))
    return values


def places_at_once(vocab_size: int) -> int:
    """How many places the output layer treats at a time."""
    return max(_ROWS, CHUNK_LOGITS // vocab_size)


def _piece(
    logits_of: Callable[..., mx.array],
    inputs: list[mx.array],
    targets: mx.array,
    *,
    by_place: bool = False,
    weights: mx.array | None = None,
) -> Any:
    """(sum of -log p, or each of them, gradients of the sum by `inputs`: rows and parameters)

    `weights` (N,): what each weighs in the sum whose gradients these are.
    """
    computed = logits_of(*inputs)
    logits, places = computed.astype(mx.float32), mx.arange(targets.size)
    normalizer = log_normalizer(logits)
    loss = normalizer - logits[places, targets]
    loss = loss if by_place else mx.sum(loss)
    (logits,) = mx.depends([logits], [loss])
    slopes = softmax_with(logits, normalizer).at[places, targets].add(-1.0)
    if weights is not None:
        slopes = slopes * weights[:, None]
    return loss, mx.vjp(logits_of, inputs, [slopes.astype(computed.dtype)])[1]
