"""A draft model: a smaller model of the same vocabulary guesses the next tokens, and the row's model verifies them.

After Leviathan, Kalman and Matias (2023), but for what counts as right: a guess is drawn from the draft model's logits
with the random numbers that the row draws the same token with, and holds if the row draws it too. So the tokens are
those of plain decoding, and the closer the two models are, the more often they draw alike.
"""

from __future__ import annotations

import math
import time

import mlx.core as mx

from ..models.hooks import forget_trimmed
from .lookup import MAX_DRAFT
from .payoff import Payoff, StepTimes, faded
from .processors import processed
from .row_cache import RowCache
from .rows import Row
from .sampler import draw

_TAIL = 2  # tokens that it has not read at most where it drafts step after step: the last guess and the token behind it


class ModelDrafter(Payoff):
    """The guesses of a row's draft model, whose cache reads what the row's does; guesses that were wrong are trimmed.

    It guesses nothing where the sequence exceeds the draft model's own context or vocabulary.
    """

    retrying = 0.02  # more seldom than for guesses that cost nothing

    def __init__(self, row: Row, cache: RowCache, vocab_size: int, times: StepTimes):
        super().__init__(MAX_DRAFT, times)
        self._row, self._cache, self._model, self._vocab_size = row, cache, cache.model, vocab_size
        self._foreign = False  # whether there was an id outside its vocabulary

    @property
    def _known(self) -> int:
        """Tokens of the sequence so far."""
        return len(self._row.job.prompt) + len(self._row.answer)

    def length(self, most: int) -> int:
        """As `Payoff.length`; 0 as well until a plain step was timed, for these guesses are not free."""
        config, known = self._model.config, self._known
        most = min(most, config.max_position_embeddings - known + 1)  # the last guess is not read
        if not self._model.model.is_long(known) and self._model.model.is_long(known + most - 1):
            most = config.original_max_position_embeddings - known + 1
        if self.times.plain is None or self._foreign or most < 1:
            return 0
        return super().length(most)

    def draft(self, length: int) -> list[int]:
        """The next `length` tokens as the draft model draws them; none while it has much to read first."""
        if self._known - self._cache.read > self._row.chunk:
            self.follow(self._cache.read + self._row.chunk)
            return []
        if self._known - self._cache.read > _TAIL:
            self.follow(self._known - 1)
        ids = self._ids(self._known)
        if ids is None:
            return []
        started = time.perf_counter()
        guesses = self._guesses(ids, length)
        if self.times.plain:
            self.guessing = faded(self.guessing, (time.perf_counter() - started) / length / self.times.plain)
        return guesses

    def follow(self, last: int) -> None:
        """Read the sequence up to `last` tokens, a chunk at a time."""
        if len(self._row.job.prompt) >= self._model.config.max_position_embeddings:
            return
        while self._cache.read < last:
            ids = self._ids(min(self._cache.read + self._row.chunk, last))
            if ids is None:
                return
            self._model.model(ids, self._cache.layers)
            mx.eval(self._cache.to_compute)
            mx.clear_cache()

    def saw_draft(self, drafted: int, accepted: int, seconds: float) -> None:
        super().saw_draft(drafted, accepted, seconds)
        for layer in self._cache.layers:
            layer.trim(max(drafted - 1 - accepted, 0))
        forget_trimmed(self._model.model, self._cache.layers)

    def _ids(self, last: int) -> mx.array | None:
        """The ids (1, n) from where it has read to the first `last`; None if it does not know one of them."""
        prompt, answer, first = self._row.job.prompt, self._row.answer, self._cache.read
        ids = [*prompt[first:last], *answer[max(first - len(prompt), 0) : max(last - len(prompt), 0)]]
        self._foreign = self._foreign or max(ids) >= self._model.config.vocab_size
        return None if self._foreign else mx.array([ids], dtype=mx.int32)

    def _guesses(self, ids: mx.array, length: int) -> list[int]:
        """Read `ids` (1, n), and draw `length` tokens behind them as the row will; its sampler stays as it is."""
        sampler, processors = self._row.sampler, self._row.processors
        before = sampler.state
        drawn: list[mx.array] = []
        try:
            for _ in range(length):
                logits = self._logits(ids)
                scores = None
                if processors:
                    guesses: list[int] = mx.concatenate(drawn).tolist() if drawn else []  # type: ignore[assignment]
                    scores = processed(processors, [*self._row.answer, *guesses], logits)[None]
                drawn.append(draw([sampler], logits[None], scores).ids)
                mx.async_eval(drawn[-1], self._cache.to_compute)
                ids = drawn[-1][None]
        finally:
            sampler.state = before
        mx.eval(self._cache.to_compute)
        return mx.concatenate(drawn).tolist()  # type: ignore[return-value]

    def _logits(self, ids: mx.array) -> mx.array:
        """Logits (vocab_size,) of the token behind `ids` (1, n), for the vocab_size of the row's model."""
        hidden = self._model.model(ids, self._cache.layers)
        logits = self._model.logits(hidden[0, -1:], [ids.shape[1] - 1])[0].astype(mx.float32)[: self._vocab_size]
        return mx.pad(logits, (0, self._vocab_size - len(logits)), constant_values=mx.array(-math.inf))
