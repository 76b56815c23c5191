"""Whether some rows fit the machine, and how many of their prompts' tokens are read at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx.utils import tree_flatten

from ..models.attention import fused_attention
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from . import machine
from . import plan as memory
from .plan import Run
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
    run = run_of_rows(model, rows, bits, chunk, _rereads(model, rows, cache, shared))
    room = (machine.room() if room is None or force else room) + _held(run, cache, shared)
    if force:
        plan = run.plan(room)
    else:
        longest = max(len(row.prompt) for row in rows)
        plan = memory.check_fits(run, room, prompt=longest, kept=kept or cache is not None)
    return Fit(plan.chunk, max(room - plan.total, 0))


def run_of_rows(model: Model, rows: Sequence[Row], bits: KVBits | None, chunk: int | None, rereads: int) -> Run:
    """What the memory of these rows depends on."""
    lengths = [len(row.prompt) for row in rows]
    return Run(
        model.config,
        sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        max(lengths) + max(row.budget for row in rows),  # shorter rows are padded in front: all answers begin together
        len(rows),
        bits,
        model.dtype.size,
        fused_attention(),
        chunk,
        rereads,
        len(set(lengths)) > 1,
    )


def _rereads(model: Model, rows: Sequence[Row], cache: list[KVCache] | None, shared: int) -> int:
    """The most tokens of a row that are read again, into keys and values of their own."""
    is_long = model.model.is_long
    begins_long = [is_long(len(row.prompt)) for row in rows]
    rereads = 0
    if cache is not None and (cache[0].lost_at(shared) or cache[0].sequence.long != tuple(begins_long)):
        rereads = shared
    if not all(begins_long) and is_long(max(len(row.prompt) + row.budget for row in rows)):
        rereads = max(rereads, memory.reread_at_boundary(model.config))
    return rereads


def _held(run: Run, cache: list[KVCache] | None, shared: int) -> int:
    """Bytes that are taken already, and that the run uses or lets go of."""
    held = sum(layer.nbytes for layer in cache or ())
    return run.weights + (min(held, run.cache_bytes()) if shared else held)
