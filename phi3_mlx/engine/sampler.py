"""From logits to the next token id. Knows no text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..models.normalizer import log_normalizer
from .alternatives import Likeliest
from .sampling import Sampling

_COLD = 1e-6  # below this temperature the likeliest token is all there is
_LEAST = 1e-30  # a smaller top_p is 0 in float32, and would exclude every token

# Numbers of each id that are alive at once while a row is drawn: its logits, and what each option adds to them.
# Measured with 50,000 and 200,000 ids, 1 and 8 rows, float32 and bfloat16.
_LOGITS, _REPETITION, _COUNTS, _NOISE, _TOP_K, _TOP_P, _MIN_P = 2, 2.75, 4.5, 3, 2.25, 5, 1.25
_PROCESSED, _LIKELIEST = 3, 2
_DRAWN_AHEAD = 4  # rows of a draft that are drawn while MLX makes room for ten operations more

# The random key, the tokens seen (V,) or None, and how often each was drawn (V,) or None.
SamplerState = tuple[mx.array, mx.array | None, mx.array | None]


class Drawn(NamedTuple):
    """Token ids (B,), their log-probabilities (B,) and the likeliest of each place, perhaps not computed yet."""

    ids: mx.array
    logprobs: mx.array
    top: Likeliest


class Sampler:
    """How a row draws: its options, its random key, and the tokens already seen and drawn."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int):
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed)
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = mx.zeros((vocab_size,), dtype=mx.bool_)
            self._seen[mx.array(list(prompt))] = True
        self._drawn: mx.array | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._drawn = mx.zeros((vocab_size,), dtype=mx.float32)
        self.rule = replace(sampling, seed=None)  # rows with the same one draw together
        mx.eval(self.state)

    @property
    def state(self) -> SamplerState:
        """What the next draw depends on, to be set again when a draw is taken back."""
        return self._key, self._seen, self._drawn

    @state.setter
    def state(self, state: SamplerState) -> None:
        self._key, self._seen, self._drawn = state

    @property
    def remembers(self) -> bool:
        """Whether what it draws depends on the tokens before."""
        return self._seen is not None or self._drawn is not None

    def next_key(self) -> mx.array:
        """A random key for one draw."""
        self._key, key = mx.random.split(self._key)
        return key

    def skip(self, tokens: Sequence[int]) -> None:
        """Go on as if these had been drawn."""
        for token in tokens:
            if self.rule.temperature >= _COLD:
                self.next_key()
            self.saw(mx.array(token))

    def saw(self, token: mx.array) -> None:
        """Note that this token (a scalar) was drawn."""
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token[None], mx.array(True), axis=0)
        if self._drawn is not None:
            self._drawn = self._drawn.at[token[None]].add(1.0)


def draw(
    samplers: Sequence[Sampler], logits: mx.array, scores: mx.array | None = None, top: Sequence[int] = ()
) -> Drawn:
    """logits (B, V), a row for each sampler -> token ids (B,) and their natural-log probabilities under the model (B,).

    `scores` (B, V) are drawn from instead, where processors changed the logits. Where they exclude every token, or one
    is NaN, the log-probability is infinite. `top`: how many of the likeliest ids each row wants to know.
    """
    logits = logits.astype(mx.float32)
    processed, scores = scores is not None, logits if scores is None else scores
    groups: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.rule, []).append(row)
    if len(groups) == 1:
        tokens = _draw_alike(samplers, scores)
    else:
        order = mx.array([row for rows in groups.values() for row in rows])
        parts = [_draw_alike([samplers[row] for row in rows], scores[mx.array(rows)]) for rows in groups.values()]
        tokens = mx.concatenate(parts)[mx.argsort(order)]
    normalizers = log_normalizer(logits)
    logprobs = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizers
    if processed:
        logprobs += mx.where(mx.isfinite(scores.max(axis=-1)), 0.0, math.inf)  # NaN of the model stays NaN
    return Drawn(tokens, logprobs, Likeliest(logits, normalizers, top))


def _draw_alike(samplers: Sequence[Sampler], scores: mx.array) -> mx.array:
    """Token ids (B,) of rows with the same rule, from scores (B, V)."""
    rule = samplers[0].rule
    remembers = samplers[0].remembers
    if remembers:
        scores = _penalized(samplers, scores)
    if rule.temperature < _COLD:
        tokens = mx.argmax(scores, axis=-1)
    else:
        # The largest is 0 first, so that nothing overflows at a low temperature.
        scores = (scores - scores.max(axis=-1, keepdims=True)) / rule.temperature
        scores = filter_scores(scores, rule)
        # With Gumbel noise added the largest score is a draw from their softmax. Each row draws as it would alone.
        noise = [mx.random.gumbel(scores.shape[-1:], key=sampler.next_key()) for sampler in samplers]
        tokens = mx.argmax(scores + mx.stack(noise), axis=-1)
    if remembers:
        for row, sampler in enumerate(samplers):
            sampler.saw(tokens[row])
    return tokens


def _penalized(samplers: Sequence[Sampler], scores: mx.array) -> mx.array:
    """Scores (B, V) of rows with the same rule, less what they lose for the tokens that were seen and drawn."""
    rule, states = samplers[0].rule, [sampler.state for sampler in samplers]
    if (penalty := rule.repetition_penalty) != 1.0:
        seen = mx.stack([seen for _, seen, _ in states])  # type: ignore[misc]
        scores = mx.where(seen, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
    if rule.presence_penalty or rule.frequency_penalty:
        drawn = mx.stack([drawn for _, _, drawn in states])  # type: ignore[misc]
        scores = scores - rule.frequency_penalty * drawn - rule.presence_penalty * (drawn > 0)
    return scores


def filter_scores(scores: mx.array, sampling: Sampling) -> mx.array:
    """Set to -inf the scores (B, V) that top-k, top-p and min-p exclude; the likeliest always stays."""
    vocab_size = scores.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        least = mx.topk(scores, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        scores = mx.where(scores < least, -math.inf, scores)
    if sampling.top_p < 1:
        order = mx.argsort(-scores, axis=-1)
        probabilities = mx.softmax(mx.take_along_axis(scores, order, axis=-1), axis=-1)
        # A token stays while those before it have not reached p yet.
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        beyond = before >= max(sampling.top_p, _LEAST)
        out = mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), order, beyond, axis=-1)
        scores = mx.where(out, -math.inf, scores)
    if sampling.min_p > 0:
        least = scores.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        scores = mx.where(scores < least, -math.inf, scores)
    return scores


def numbers_drawn(sampling: Sampling, *, processed: bool = False, top: bool = False) -> float:
    """Numbers of each id of the vocabulary, in float32, that drawing a row's token holds, its logits among them.

    `processed`: whether processors change the logits first; `top`: whether the likeliest ids are told too.
    """
    if sampling.temperature < _COLD:
        filters = 0.0
    else:
        filters = _NOISE + _TOP_K * (sampling.top_k > 0) + _TOP_P * (sampling.top_p < 1) + _MIN_P * (sampling.min_p > 0)
    counts = bool(sampling.presence_penalty or sampling.frequency_penalty)
    others = _PROCESSED * processed + _LIKELIEST * top
    return _LOGITS + filters + others + _REPETITION * (sampling.repetition_penalty != 1.0) + _COUNTS * counts


def drawing_bytes(vocab_size: int, numbers: float, rows: int, verified: int) -> int:
    """Bytes at the peak while a token is drawn of each row, or `verified` tokens of one, each behind the one before.

    `numbers`: `numbers_drawn` of the rows.
    """
    alive = rows * numbers if verified == 1 else verified * _LOGITS + min(verified, _DRAWN_AHEAD) * numbers
    return int(4 * vocab_size * alive)
