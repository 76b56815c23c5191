"""The rows of a batch: each a job, and how far it is."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..errors import CacheError
from ..models.cache import RECOMPUTE_CHUNK, KVCache
from ..models.decoder import Model
from .alternatives import Alternatives
from .choices import LikeliestChoice
from .jobs import Job
from .processors import Constraint, Processor
from .row_cache import RowCache
from .sampler import Sampler
from .scores import TokenScore
from .tokens import FinishReason, Token

FORCED = 16  # tokens at most that are read together because nothing else may follow


class _Where(Exception):
    """A traceback as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Answered(NamedTuple):
    """A token of a row's answer that is known: its id, its log-probability, and the likeliest in its place."""

    row: Row
    id: int
    logprob: float
    top: Alternatives = ()


class Row:
    """A job, the ids that it has read and made, and what the model, and its `draft` model, have read of it.

    `budget`: tokens of the answer at most. `error`: why it failed, where it did. `progress`: tokens of the prompt that
    are in the cache, and computed. `scores`: of the tokens that the job asks for, so far.
    """

    def __init__(self, index: int, job: Job, model: Model):
        self.index, self.job = index, job
        self.prompt = list(job.prompt)  # what is to be read; after a pause the answer so far belongs to it
        self.answer: list[int] = []
        self.budget = model.config.max_position_embeddings - len(self.prompt)
        if job.max_tokens is not None:
            self.budget = min(job.max_tokens, self.budget)
        self.error: Exception | None = None
        self.progress = 0
        self.bits = job.kv_bits if job.cache is None else job.cache[0].bits
        self.scores: list[TokenScore] = []
        self.scored_from = len(self.prompt) if job.scored_from is None and job.candidates else job.scored_from
        self.main = RowCache(model, job.cache, self.reusable, self.bits)
        self.draft = None
        if job.draft is not None:
            bits = None if self.bits is None else self.bits.dividing(job.draft.config.head_dim)
            self.draft = RowCache(job.draft, job.draft_cache, self.prompt, bits)
        self.chunk = RECOMPUTE_CHUNK
        self.sampler = Sampler(job.sampling, job.prompt, model.config.vocab_size)
        self._stop_ids = frozenset(job.stop_ids)
        self.processors: list[Processor] = [*job.processors]
        self._choice: LikeliestChoice | None = None
        if job.choices:
            self._choice = LikeliestChoice(job.choices, job.stop_ids, model.config.vocab_size)
            self.processors.append(Constraint(self._choice))
        self.cancelled = self._ended = False
        self._claim: object = None

    def begin(self, chunk: int) -> None:
        """Take the cache that was copied or that the job brought, or make one. `chunk`: tokens read at once."""
        self.main.begin(self.length)
        self.progress = self.read
        self.chunk = chunk
        sequence = self.cache[0].sequence
        sequence.recompute_chunk = min(chunk, RECOMPUTE_CHUNK)
        sequence.prompt = (len(self.job.prompt),)
        sequence.wanted_from = None if self.scored_from is None else self.scored_from - 1
        if self.draft is not None:
            self.draft.begin(self.length)
            self.draft.layers[0].sequence.recompute_chunk = sequence.recompute_chunk
        # Not this row itself: a cycle would keep keys and values until Python looks for cycles.
        self._claim = sequence.reader = object()

    def pause(self) -> None:
        """Let go of keys and values; what was read and said is recomputed once the row begins anew."""
        self.prompt = [*self.job.prompt, *self.answer]
        owned = self._owns_cache
        for cache in self.caches:
            cache.pause(owned)
        self.progress, self.scores = 0, []

    @property
    def caches(self) -> list[RowCache]:
        """That of its model, and of its draft model where it has one."""
        return [self.main] if self.draft is None else [self.main, self.draft]

    @property
    def cache(self) -> list[KVCache]:
        """What the model has read it into, one entry a layer; empty before it begins."""
        return self.main.layers

    @property
    def draft_cache(self) -> list[KVCache]:
        """What the draft model has read it into; empty without one."""
        return [] if self.draft is None else self.draft.layers

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the cache it begins with has read."""
        return self.main.reused

    @property
    def reusable(self) -> list[int]:
        """What its caches may begin with, and one more: the token before the first that is scored must be read here."""
        return self.prompt[: self.scored_from]

    @property
    def length(self) -> int:
        """Tokens that the sequence counts as having before the answer begins."""
        return max(len(self.prompt), self.job.length or 0)

    def targets(self, first: int, end: int) -> list[tuple[int, list[int]]]:
        """What is scored once the tokens `first:end` are read: places among them, and the ids that may follow each."""
        if self.scored_from is None:
            return []
        prompt = self.job.prompt
        places = range(max(first, self.scored_from - 1), min(end, len(prompt) - 1))
        targets = [(place, [prompt[place + 1]]) for place in places]
        if self.job.candidates and first < len(prompt) <= end:
            targets.append((len(prompt) - 1, list(self.job.candidates)))
        return targets

    @property
    def constraint(self) -> Constraint | None:
        """What may leave one way to go on, where nothing else changes the logits."""
        processors = self.processors
        return processors[0] if len(processors) == 1 and isinstance(processors[0], Constraint) else None

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        """The ids that will follow `answer`, tokens said and perhaps more, whatever the model computes.

        `most` at most, and a token of the budget is left.
        """
        most = min(most, self.budget - len(answer) - 1)
        if self.constraint is None or most < 1 or not self.main.model.of_family:
            return []
        return self.constraint.forced(answer, self.before_boundary(len(self.job.prompt) + len(answer), most))

    def decide(self) -> None:
        """Once the prompt is read, find the likeliest of the job's choices, if it has some."""
        if self._choice is not None:
            self._choice.decide(self.main.model, self.cache, self.prompt, self.chunk)

    def before_boundary(self, length: int, most: int) -> int:
        """How many of `most` tokens may follow `length` in one pass: none past a boundary of LongRoPE."""
        model = self.main.model
        if not model.model.is_long(length) and model.model.is_long(length + most):
            most = model.config.original_max_position_embeddings - length
        return most

    def let_go(self) -> None:
        """Free the keys and values of a row that has ended."""
        self._ended = True
        for cache in self.caches:
            cache.layers = []

    @property
    def begun(self) -> bool:
        return bool(self.cache)

    @property
    def read(self) -> int:
        """Tokens in the cache."""
        return self.main.read

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is still to be read."""
        return not self.finished and self.read < len(self.prompt)

    @property
    def drafts(self) -> bool:
        """Whether tokens of the answer may be drafted."""
        return self.main.model.of_family and (self.job.lookup > 0 or self.job.draft is not None)

    @property
    def to_compute(self) -> list[mx.array]:
        """All that its caches keep, some of it perhaps not computed yet."""
        return [array for cache in self.caches for array in cache.to_compute]

    @property
    def left(self) -> int:
        """How many more tokens the budget allows."""
        return self.budget - len(self.answer)

    @property
    def finished(self) -> bool:
        return self._ended or (self.left <= 0 and not self.job.branches and self.progress >= len(self.prompt))

    def finish(self) -> None:
        """The caller has seen enough."""
        self.cancelled = self._ended = True

    def fail(self, error: Exception) -> None:
        """End with an error."""
        if error.__traceback__ is not None:
            # As text: its frames hold rows, a cycle that would keep keys and values until Python looks for cycles.
            where = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            error.__cause__, error.__context__ = _Where(where), None
        self.error, self._ended = error.with_traceback(None), True

    @property
    def _owns_cache(self) -> bool:
        """Whether no other run has taken the cache over."""
        return self.cache[0].sequence.reader is self._claim

    def check_claim(self) -> None:
        """CacheError if another run has taken the cache over."""
        if not self._owns_cache:
            raise CacheError("another run has taken over this prompt cache; use one cache for each stream")

    def say(self, token: int, logprob: float, top: Alternatives = ()) -> Token:
        """Add the next token of the answer, and end the row with it where it is the last."""
        self.answer.append(token)
        reason: FinishReason | None = None
        if token in self._stop_ids:
            reason = "stop"
            self._ended = True
        elif self.left <= 0:
            reason = "length"
        return Token(self.index, token, logprob, reason, top)


def raise_first(failed: Iterable[Row]) -> None:
    """Raise the error of the first row that failed, if there is one."""
    for row in failed:
        assert row.error is not None
        raise row.error
