"""From logits to the next token id. Knows no text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import mlx.core as mx

from .sampling import Sampling

_COLD = 1e-6  # below this temperature the likeliest token is all there is
_LEAST = 1e-30  # a smaller top_p is 0 in float32, and would exclude every token


SamplerState = tuple[list[mx.array], mx.array | None]  # each row's random key, and the tokens seen (B, V) or None


class Sampler:
    """The state of drawing for some rows: their random keys and the tokens already seen."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int):
        self._sampling = sampling
        # A row draws as it would alone, so with a seed all rows start from the same key.
        seeds = [int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed for _ in prompts]
        self._keys = [mx.random.key(seed) for seed in seeds]
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = mx.zeros((len(prompts), vocab_size), dtype=mx.bool_)
            for row, prompt in enumerate(prompts):
                self._seen[row, mx.array(list(prompt))] = True

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """logits (B, V) -> token ids (B,) and their natural-log probabilities under the model itself (B,)."""
        logits = logits.astype(mx.float32)
        scores, sampling = logits, self._sampling
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            scores = mx.where(self._seen, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
        if sampling.temperature < _COLD:
            tokens = mx.argmax(scores, axis=-1)
        else:
            # The largest is 0 first, so that nothing overflows at a low temperature.
            scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
            scores = filter_scores(scores, sampling)
            tokens = mx.argmax(scores + self._noise(scores.shape[-1]), axis=-1)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, tokens[:, None], mx.array(True), axis=1)
        logprobs = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        return tokens, logprobs

    def _noise(self, vocab_size: int) -> mx.array:
        """Gumbel noise (B, V); the argmax of scores plus it is a draw from their softmax."""
        rows = []
        for i, key in enumerate(self._keys):
            self._keys[i], draw = mx.random.split(key)
            rows.append(mx.random.gumbel((vocab_size,), key=draw))
        return mx.stack(rows)

    @property
    def state(self) -> SamplerState:
        """What the next draw depends on, to be set again when a draw is taken back."""
        return list(self._keys), self._seen

    @state.setter
    def state(self, state: SamplerState) -> None:
        self._keys, self._seen = list(state[0]), state[1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self._keys = [self._keys[i] for i in rows]
        if self._seen is not None:
            self._seen = self._seen[mx.array(list(rows))]


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
