"""What the memory of a row depends on."""

from __future__ import annotations

from dataclasses import replace

from ..models.cache import KVCache
from ..models.decoder import Model
from .plan import Workload, recomputed_at_boundary
from .rows import Row

ANSWER_BLOCK = 512  # tokens of an answer without a limit that memory is reserved for at a time


def workload_of(model: Model, row: Row, chunk: int | None) -> Workload:
    """Of a row whose answer takes what it may, or, where it has no limit, a block. `chunk`: tokens read at once."""
    answer = row.left if row.job.max_tokens is not None else min(row.left, ANSWER_BLOCK)
    workload = Workload.of_model(model, row.length + answer, kv_bits=row.bits)
    scores = row.scored_from is not None or row.job.branches > 0
    reading_along = None
    if row.job.draft is not None:
        again = _recomputed(row.job.draft, row, row.draft_given, row.draft_shared)
        reading_along = replace(Workload.of_model(row.job.draft, workload.length), recomputed=again)
    return replace(
        workload,
        chunk=chunk,
        recomputed=_recomputed(model, row, row.given, row.shared),
        branches=row.job.branches,
        scores=scores,
        draft=reading_along,
    )


def _recomputed(model: Model, row: Row, cache: list[KVCache] | None, shared: int) -> int:
    """The most tokens that are recomputed, into a second cache; `shared` are those that `cache` has read."""
    is_long = model.model.is_long
    begins_long = is_long(row.length)
    recomputed = 0
    if cache is not None and (cache[0].lost_at(shared) or cache[0].sequence.long != (begins_long,)):
        recomputed = shared
    if not begins_long and is_long(row.length + row.left):
        recomputed = max(recomputed, recomputed_at_boundary(model.config))
    return recomputed


def brought_by(row: Row, workload: Workload) -> int:
    """Bytes of the caches that the row's job brought, which it uses or lets go of."""
    main, *of_draft = workload.parts
    brought = min(row.brought, main.cache_bytes()) if row.shared else row.brought
    for draft in of_draft:
        brought += min(row.draft_brought, draft.cache_bytes()) if row.draft_shared else row.draft_brought
    return brought


def held_by(row: Row, workload: Workload) -> int:
    """Bytes that the row holds, or once it begins uses or lets go of."""
    if not row.begun:
        return brought_by(row, workload)
    return sum(layer.nbytes for layer in (*row.cache, *row.draft_cache))
