"""Drafts of a row: where earlier text suggests what comes next, a step verifies several tokens."""

from __future__ import annotations

import mlx.core as mx

from ..models.decoder import Model
from .lookup import Drafter, accepted_of
from .processors import processed
from .rows import Row
from .sampler import SamplerState, draw


def drafter_of(row: Row) -> Drafter:
    """The row's drafter, which knows its prompt and its answer so far, and hears of every further token."""
    if row.drafter is None:
        row.drafter = Drafter([*row.job.prompt, *row.answer], row.job.lookup)
    return row.drafter


def draft_of(row: Row, model: Model) -> list[int]:
    """The likely next tokens behind the last, none past a boundary of LongRoPE; perhaps empty."""
    total, wanted = row.read + 1, row.left - 1
    if not model.model.is_long(total) and model.model.is_long(total + wanted):
        wanted = model.config.original_max_position_embeddings - total
    return drafter_of(row).draft(wanted)


def verify(row: Row, draft: list[int], model: Model) -> list[tuple[Row, int, float]]:
    """Read the last token and the draft in one pass; what is drawn after the last and every right token of the draft.

    The tokens are those of plain decoding: one that was drafted counts only if the same was drawn in its place.
    """
    row.check_claim()
    logits = model.logits(model.model(mx.array([[row.answer[-1], *draft]]), row.cache))[0].astype(mx.float32)
    drawn, states = [], []
    for position in range(len(draft) + 1):
        scores = None
        if row.job.processors:
            scores = processed(row.job.processors, [*row.answer, *draft[:position]], logits[position])[None]
        drawn.append(draw([row.sampler], logits[position : position + 1], scores))
        states.append(row.sampler.state)
    ids: list[int] = mx.concatenate([ids for ids, _ in drawn]).tolist()  # type: ignore[assignment]
    logprobs: list[float] = mx.concatenate([logprobs for _, logprobs in drawn]).tolist()  # type: ignore[assignment]
    accepted = accepted_of(draft, ids)
    _take_back(row, len(draft) - accepted, states[accepted])
    return [(row, token, logprob) for token, logprob in zip(ids[: accepted + 1], logprobs, strict=False)]


def _take_back(row: Row, tokens: int, sampler: SamplerState) -> None:
    """Forget the newest `tokens` of what was read, and all draws since the sampler was in that state."""
    row.sampler.state = sampler
    mx.async_eval(sampler)
    for layer in row.cache:
        layer.trim(tokens)
