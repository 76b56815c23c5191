"""Drafts of a row that is alone: guesses of what comes next, of which one step verifies several."""

from __future__ import annotations

import time

import mlx.core as mx

from ..models.decoder import Model
from ..models.hooks import forget_trimmed
from .draft_model import ModelDrafter
from .lookup import LookupDrafter, accepted_of
from .payoff import Payoff, StepTimes
from .processors import processed
from .rows import Answered, Row
from .sampler import SamplerState, draw


class Drafter:
    """The drafts of a row, from earlier text or by its draft model, whichever pays more.

    `draft` guesses and `verify` says what they are worth; `saw_plain` is told of every step of one token.
    """

    def __init__(self, row: Row, model: Model):
        self.row, self._model = row, model
        self.times = StepTimes()
        self._heard = 0  # tokens of the answer that lookup knows
        self._lookup = LookupDrafter(row.job.prompt, row.job.lookup, self.times) if row.job.lookup else None
        self._guesser: ModelDrafter | None = None
        if row.draft is not None:
            self._guesser = ModelDrafter(row, row.draft, model.config.vocab_size, self.times)
        self._source: Payoff | None = None  # of the last draft

    def follow(self) -> None:
        """Let the draft model read what the row has read of its prompt."""
        if self._guesser is not None:
            self.row.check_claim()
            self._guesser.follow(self.row.progress)

    @property
    def likely(self) -> bool:
        """Whether the next step will probably verify a draft."""
        return bool(self._looked_up(1)) or (self._guesser is not None and self._guesser.length(1) > 0)

    def draft(self) -> list[int]:
        """The likely next tokens behind the last, none past a boundary of LongRoPE; perhaps empty."""
        self.row.check_claim()
        if self.row.forced(self.row.answer, 1):
            return []  # what must follow needs no verifying
        most = self.row.before_boundary(self.row.read + 1, self.row.left - 1)
        draft, self._source = self._looked_up(most), self._lookup
        if self._guesser is not None:
            length = self._guesser.length(most)
            rate = self._lookup.rate(len(draft)) if self._lookup is not None else 1.0
            if self._guesser.rate(length) > rate:
                draft, self._source = self._guesser.draft(length), self._guesser
        return draft

    def verify(self, draft: list[int]) -> list[Answered]:
        """Read the last token and the draft in one pass; what is drawn behind that and every right token of the draft.

        The tokens are those of plain decoding: one that was drafted counts only if the same was drawn in its place.
        """
        row, model, started = self.row, self._model, time.perf_counter()
        logits = model.logits(model.model(mx.array([[row.answer[-1], *draft]]), row.cache))[0].astype(mx.float32)
        drawn, states = [], []
        for position in range(len(draft) + 1):
            scores = None
            if row.processors:
                scores = processed(row.processors, [*row.answer, *draft[:position]], logits[position])[None]
            drawn.append(draw([row.sampler], logits[position : position + 1], scores, [row.job.top]))
            states.append(row.sampler.state)
            if row.processors and drawn[-1].ids.item() != (*draft, None)[position]:
                break  # a constraint need not know how to go on behind a token that it excludes
        ids: list[int] = mx.concatenate([each.ids for each in drawn]).tolist()  # type: ignore[assignment]
        logprobs: list[float] = mx.concatenate([each.logprobs for each in drawn]).tolist()  # type: ignore[assignment]
        accepted = accepted_of(draft, ids)
        _take_back(row, len(draft) - accepted, states[accepted])
        forget_trimmed(model.model, row.cache)
        assert self._source is not None
        self._source.saw_draft(len(draft), accepted, time.perf_counter() - started)
        told = zip(ids[: accepted + 1], logprobs, drawn, strict=False)
        return [Answered(row, token, logprob, *each.top.told()) for token, logprob, each in told]

    def _looked_up(self, most: int) -> list[int]:
        """The draft of earlier text."""
        if self._lookup is None:
            return []
        for token in self.row.answer[self._heard :]:
            self._lookup.add(token)
        self._heard = len(self.row.answer)
        return self._lookup.draft(most)


def _take_back(row: Row, tokens: int, sampler: SamplerState) -> None:
    """Forget the newest `tokens` of what was read, and all draws since the sampler was in that state."""
    row.sampler.state = sampler
    mx.async_eval(sampler)
    for layer in row.cache:
        layer.trim(tokens)
