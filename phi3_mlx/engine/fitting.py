"""What the memory of a row depends on."""

from __future__ import annotations

from dataclasses import replace

from ..models.decoder import Model
from .plan import Workload, recomputed_at_boundary
from .rows import Row

ANSWER_BLOCK = 512  # tokens of an answer without a limit that memory is reserved for at a time


def workload_of(model: Model, row: Row, chunk: int | None) -> Workload:
    """Of a row whose answer takes what it may, or, where it has no limit, a block. `chunk`: tokens read at once."""
    answer = row.left if row.job.max_tokens is not None else min(row.left, ANSWER_BLOCK)
    workload = Workload.of_model(model, row.length + answer, kv_bits=row.bits)
    scores = row.scored_from is not None or row.job.branches > 0
    return replace(workload, chunk=chunk, recomputed=_recomputed(model, row), branches=row.job.branches, scores=scores)


def _recomputed(model: Model, row: Row) -> int:
    """The most tokens that are recomputed, into a second cache."""
    is_long, cache, shared = model.model.is_long, row.given, row.shared
    begins_long = is_long(row.length)
    recomputed = 0
    if cache is not None and (cache[0].lost_at(shared) or cache[0].sequence.long != (begins_long,)):
        recomputed = shared
    if not begins_long and is_long(row.length + row.left):
        recomputed = max(recomputed, recomputed_at_boundary(model.config))
    return recomputed


def brought_by(row: Row, workload: Workload) -> int:
    """Bytes of the cache that the row's job brought, which it uses or lets go of."""
    return min(row.brought, workload.cache_bytes()) if row.shared else row.brought


def held_by(row: Row, workload: Workload) -> int:
    """Bytes that the row holds, or once it begins uses or lets go of."""
    return sum(layer.nbytes for layer in row.cache) if row.begun else brought_by(row, workload)
