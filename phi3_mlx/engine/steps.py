"""Steps of a batch: a forward pass over some tokens of each row, and what is drawn from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from ..errors import CacheError, Phi3Error
from ..models.cache import KVCache
from ..models.decoder import Model
from .rows import Row
from .sampler import Sampler, SamplerState

Drawn = tuple[mx.array, mx.array]  # token ids (B,) and their log-probabilities (B,), perhaps not computed yet


class Step(NamedTuple):
    """What a step gave: for each token its row, id and log-probability. `drafted`: how many tokens it verified."""

    tokens: list[tuple[Row, int, float]]
    drafted: int = 0


class Stepper:
    """A model, the cache that it extends and the sampler: the rows of both are the batch's, in its order."""

    def __init__(self, model: Model, cache: list[KVCache], sampler: Sampler):
        self._model, self.cache, self._sampler = model, cache, sampler
        # Not this object itself: a cycle would keep keys and values until Python looks for cycles.
        self._reader = cache[0].sequence.reader = object()

    @property
    def offset(self) -> int:
        """Tokens that the cache has read, padding included."""
        return self.cache[0].offset

    def most_ahead(self, wanted: int) -> int:
        """How many of `wanted` tokens a step may read after the next one: none past a boundary of LongRoPE."""
        model, total = self._model, self.offset + 1
        if not model.model.is_long(total) and model.model.is_long(total + wanted):
            return model.config.original_max_position_embeddings - total
        return wanted

    def forward(self, ids: mx.array) -> mx.array:
        """ids (B, L), which the cache takes in -> hidden states (B, L, hidden_size).

        Raises CacheError if another run has taken the cache over.
        """
        if self.cache[0].sequence.reader is not self._reader:
            raise CacheError("another run has taken over this prompt cache; use one cache for each stream")
        return self._model.model(ids, self.cache)

    def draw(self, hidden: mx.array) -> Drawn:
        """The next token of each row, from hidden states (B, L, hidden_size)."""
        return self._sampler(self._model.logits(hidden)[:, -1])

    def draw_each(self, hidden: mx.array) -> tuple[Drawn, list[SamplerState]]:
        """Of one row the token after each position (1, L, hidden_size), and what the sampler was after each draw."""
        logits = self._model.logits(hidden)
        drawn, states = [], []
        for position in range(logits.shape[1]):
            drawn.append(self._sampler(logits[:, position]))
            states.append(self._sampler.state)
        ids, logprobs = mx.concatenate([ids for ids, _ in drawn]), mx.concatenate([odds for _, odds in drawn])
        return (ids, logprobs), states

    def begin(self, hidden: mx.array) -> Drawn:
        """Draw the first token of each answer from the prompts' hidden states, and wait for it."""
        drawn = self.draw(hidden)
        mx.eval(drawn, self._sampler.state)
        return drawn

    def queue(self, ids: mx.array) -> Drawn:
        """Begin the step that reads `ids` (B, 1), and wait for nothing."""
        drawn = self.draw(self.forward(ids))
        mx.async_eval(drawn, self._sampler.state)
        return drawn

    def take_back(self, tokens: int, sampler: SamplerState) -> None:
        """Forget the newest `tokens` of what was read, and all draws since the sampler was in that state."""
        self._sampler.state = sampler
        mx.async_eval(sampler)
        for layer in self.cache:
            layer.trim(tokens)

    def select(self, slots: list[int], drawn: Drawn) -> Drawn:
        """Keep only the rows in these slots: in the cache, in the sampler and of what was drawn."""
        rows = mx.array(slots)
        self.cache[0].sequence.select(rows)
        for layer in self.cache:
            layer.select(rows)
        self._sampler.select(slots)
        return drawn[0][rows], drawn[1][rows]

    def settle(self) -> None:
        """Compute all that the cache keeps: no other thread could, and it may outlive the run."""
        mx.eval([layer.state for layer in self.cache], self.cache[0].sequence.kept)


def read_drawn(drawn: Drawn) -> list[tuple[int, float]]:
    """Wait for the tokens and their log-probabilities. Raises Phi3Error where the model computed NaN."""
    ids: list[int] = drawn[0].tolist()  # type: ignore[assignment]
    logprobs: list[float] = drawn[1].tolist()  # type: ignore[assignment]
    if any(map(math.isnan, logprobs)):
        raise Phi3Error(
            "the model computed NaN: its weights are bad or its number type overflows; load it with dtype='float32'"
        )
    return list(zip(ids, logprobs, strict=True))
