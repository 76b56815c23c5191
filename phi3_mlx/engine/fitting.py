"""Whether some rows fit the machine, and how many of their prompts' tokens are read at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from . import machine
from . import plan as memory
from .plan import Workload, recomputed_at_boundary
from .rows import Row


@dataclass(frozen=True)
class Fit:
    """How a run reads: `chunk` tokens of a prompt at once, with `spare` bytes of its room left by its plan."""

    chunk: int
    spare: float


def fit(
    model: Model,
    rows: Sequence[Row],
    *,
    cache: list[KVCache] | None,
    shared: int,
    bits: KVBits | None,
    chunk: int | None,
    room: float | None,
    force: bool,
    kept: bool,
) -> Fit:
    """Choose the prefill chunk, unless `chunk` says it.

    `cache`: one that has read the first `shared` tokens of the one prompt. `room`, `force` and `kept` are those of
    `Generation`. Raises MemoryLimitError if the run does not fit.
    """
    workload = workload_of(model, rows, bits, chunk, _recomputed(model, rows, cache, shared))
    room = (machine.room() if room is None or force else room) + _held(workload, cache, shared)
    if force:
        plan = workload.plan(room)
    else:
        longest = max(len(row.prompt) for row in rows)
        plan = memory.check_fits(workload, room, prompt=longest, kept=kept or cache is not None)
    return Fit(plan.chunk, max(room - plan.total, 0))


def workload_of(model: Model, rows: Sequence[Row], bits: KVBits | None, chunk: int | None, recomputed: int) -> Workload:
    """What the memory of these rows depends on."""
    lengths = [len(row.prompt) for row in rows]
    # Shorter rows are padded in front: all answers begin together.
    length = max(lengths) + max(row.budget for row in rows)
    workload = Workload.of_model(model, length, len(rows), kv_bits=bits)
    return replace(workload, chunk=chunk, recomputed=recomputed, ragged=len(set(lengths)) > 1)


def _recomputed(model: Model, rows: Sequence[Row], cache: list[KVCache] | None, shared: int) -> int:
    """The most tokens of a row that are recomputed, into a second cache."""
    is_long = model.model.is_long
    begins_long = [is_long(len(row.prompt)) for row in rows]
    recomputed = 0
    if cache is not None and (cache[0].lost_at(shared) or cache[0].sequence.long != tuple(begins_long)):
        recomputed = shared
    if not all(begins_long) and is_long(max(len(row.prompt) + row.budget for row in rows)):
        recomputed = max(recomputed, recomputed_at_boundary(model.config))
    return recomputed


def _held(workload: Workload, cache: list[KVCache] | None, shared: int) -> int:
    """Bytes that are taken already, and that the run uses or lets go of."""
    held = sum(layer.nbytes for layer in cache or ())
    return workload.weights + (min(held, workload.cache_bytes()) if shared else held)
