"""What the memory of a row depends on."""

from __future__ import annotations

from dataclasses import replace

from .lookup import MAX_DRAFT
from .plan import Workload, recomputed_at_boundary
from .row_cache import RowCache
from .rows import Row
from .sampler import numbers_drawn

ANSWER_BLOCK = 512  # tokens of an answer without a limit that memory is reserved for at a time


def workload_of(of_model: Workload, row: Row) -> Workload:
    """Of a row whose answer takes what it may, or, where it has no limit, a block. `of_model`: that of any row."""
    answer = row.left if row.job.max_tokens is not None else min(row.left, ANSWER_BLOCK)
    answer = max(answer, *map(len, row.job.choices), 0)  # all of a choice is scored, if not said
    length = row.length + answer
    draft = None
    if row.draft is not None:
        draft = replace(Workload.of_model(row.draft.model, length), recomputed=_recomputed(row, row.draft))
    return replace(
        of_model,
        length=length,
        bits=row.bits,
        recomputed=_recomputed(row, row.main),
        branches=max(row.job.branches, int(bool(row.job.choices))),
        scores=row.scored_from is not None or row.job.branches > 0 or row.constraint is not None,
        draft=draft,
        prompt=len(row.prompt),
        verified=1 + max(row.job.lookup, 0 if draft is None else MAX_DRAFT),
        drawing=numbers_drawn(row.job.sampling, processed=bool(row.processors), top=row.job.top > 0),
    )


def _recomputed(row: Row, cache: RowCache) -> int:
    """The most tokens that the model of `cache` recomputes, into a second one."""
    is_long = cache.model.model.is_long
    begins_long = is_long(row.length)
    recomputed, given = 0, cache.given
    if given is not None and (given[0].lost_at(cache.reused) or given[0].sequence.long != (begins_long,)):
        recomputed = cache.reused
    if not begins_long and is_long(row.length + row.left):
        recomputed = max(recomputed, recomputed_at_boundary(cache.model.config))
    return recomputed


def brought_by(row: Row, workload: Workload) -> int:
    """Bytes of the caches that the row's job brought, which it uses or lets go of."""
    return sum(
        min(cache.brought, part.cache_bytes()) if cache.reused else cache.brought
        for cache, part in zip(row.caches, workload.parts, strict=True)
    )


def held_by(row: Row, workload: Workload) -> int:
    """Bytes that the row holds, or once it begins uses or lets go of."""
    return sum(cache.nbytes for cache in row.caches) if row.begun else brought_by(row, workload)
