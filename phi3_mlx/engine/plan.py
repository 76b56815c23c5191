"""How much memory a run needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx.utils import tree_flatten

from ..config import Config
from ..errors import ContextLengthError, MemoryLimitError
from ..models.attention import fused_attention
from ..models.cache import RECOMPUTE_CHUNK, KVBits, kv_bytes
from ..models.hooks import Watcher, watchers_of
from ..models.other import Config as OtherConfig
from ..models.pass_shape import PassShape
from ..models.slots import LIKE
from ..models.workspace import workspace_bytes
from ..sizes import size_text
from ..store.checkpoint import Checkpoint, model_size
from . import machine
from .lookup import MAX_DRAFT
from .sampler import drawing_bytes, numbers_drawn
from .sampling import Sampling
from .scores import positions_at_once

if TYPE_CHECKING:
    from ..models.decoder import LongRopeRule, Model

CHUNKS = (2048, 1024, 512, 256, 128, 64)  # prompt tokens read at once, best first
_CPU_CHUNK = 512  # large chunks feed a GPU; on the CPU they only cost memory
_OFFERED_BITS = (8, 6, 4, 3, 2)  # what a refusal tries, best quality first
_GOOD_BITS = 4  # fewer cost much quality


@dataclass(frozen=True)
class Plan:
    """Bytes that a run takes at its peak: `weights`, keys and values, and the `workspace` of a prefill chunk."""

    weights: int
    cache: int
    workspace: int
    chunk: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Workload:
    """What a run's memory depends on: the model, its weights' bytes, the sequence's length in the end, the batch.

    `of_model`, `of_directory` and `of_release` make one for a model in memory, on disk, or not downloaded.

    `itemsize` is the bytes of a number in computation, 2 on a GPU and 4 on MLX's CPU backend unless told otherwise;
    `fused_kernel`, whether attention is one kernel that keeps its scores in registers, as on a GPU. `chunk` is how many
    tokens of a prompt are read at once; without it, as many as fit. `recomputed`: how many tokens of a row are
    recomputed into a second cache if the sequence crosses LongRoPE's boundary; 0: it cannot. `branches`: how many
    continuations of the sequence, with caches of their own, there are at once. `scores`: whether log-probabilities of
    given tokens are computed. `draft`: a draft model that reads along, in caches of the same bits; its own length and
    bits are not looked at. `prompt`: how many of the tokens are there before the answer begins, at least. `verified`:
    tokens of a step at most where there is one row: the longest draft, and one. `drawing`: what its sampling takes, as
    `sampler.numbers_drawn` says it. `watchers`: who looks at it, keeps and changes values.
    """

    config: Config
    weights: int
    length: int
    rows: int = 1
    bits: KVBits | None = None
    itemsize: int = 2
    fused_kernel: bool = True
    chunk: int | None = None
    recomputed: int = 0
    branches: int = 0
    scores: bool = False
    draft: Workload | None = None
    prompt: int = 0
    verified: int = MAX_DRAFT + 1
    drawing: float = numbers_drawn(Sampling())
    watchers: tuple[Watcher, ...] = ()

    @classmethod
    def of_model(cls, model: Model, length: int, rows: int = 1, *, kv_bits: KVBits | None = None) -> Workload:
        """For a model in memory, in the dtype and on the device that it is computed in."""
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        kind = cls if model.of_family else EstimatedWorkload
        workload = kind(model.config, weights, length, rows, kv_bits, model.dtype.size, fused_attention())
        return replace(workload, watchers=watchers_of(model.model))

    @classmethod
    def of_directory(
        cls,
        directory: Path | Checkpoint,
        length: int,
        *,
        dtype: str | None = None,
        kv_bits: KVBits | None = None,
        fused_kernel: bool | None = None,
    ) -> Workload:
        """For a model on disk, as `load_model` would load it; only headers are read.

        A `length` beyond the model's context is cut to it. `fused_kernel`: this machine's without it.
        Raises CheckpointError and ConfigError as `load_model` does.
        """
        size = model_size(directory, dtype)
        length = min(length, size.config.max_position_embeddings)
        fused_kernel = fused_attention() if fused_kernel is None else fused_kernel
        return cls(size.config, size.weights, length, bits=kv_bits, itemsize=size.itemsize, fused_kernel=fused_kernel)

    @classmethod
    def of_release(cls, shape: Config, weights: int, *, fused_kernel: bool = True) -> Workload:
        """For a released model with `weights` bytes of weights, one token long; on a GPU, or on the CPU in float32."""
        return cls(shape, weights, 1, itemsize=2 if fused_kernel else 4, fused_kernel=fused_kernel)

    def crossing(self) -> Workload:
        """The same for a prompt that LongRoPE reads with the short factors and an answer that may need the long."""
        return replace(self, recomputed=recomputed_at_boundary(self.config))

    def plan(self, room: float) -> Plan:
        """The plan with the largest prefill chunk that fits `room` bytes, with the smallest if none does."""
        parts = self.parts
        weights, cache = (
            sum(sizes) for sizes in zip(*((part.weights, part.cache_bytes()) for part in parts), strict=True)
        )
        works = ((chunk, max(part.working(chunk) for part in parts)) for chunk in self.chunks())
        plans = (Plan(weights, cache, work, chunk) for chunk, work in works)
        for plan in plans:
            if plan.total <= room:
                break
        return plan

    @property
    def parts(self) -> list[Workload]:
        """That of the model itself, and of the draft model where there is one: they compute in turn."""
        if self.draft is None:
            return [self]
        config = self.draft.config
        length = min(self.length, config.max_position_embeddings)
        bits = None if self.bits is None else self.bits.dividing(config.head_dim)
        drafting = replace(self.draft, length=length, bits=bits, chunk=self.chunk, verified=1, drawing=self.drawing)
        return [replace(self, draft=None), drafting]

    @property
    def shares_slots(self) -> bool:
        """Whether its row may share arrays with others while it answers."""
        return self.bits is None and self.config.sparse_layers is None

    def working(self, chunk: int) -> int:
        """Bytes beside weights and cache at most, with chunks of `chunk` tokens."""
        return max(self.workspace(chunk), self.recomputing_beside(chunk) - self.cache_bytes())

    def chunks(self) -> list[int]:
        """How many tokens of a prompt may be read at once, best first."""
        return [self.chunk] if self.chunk else [chunk for chunk in CHUNKS if self.fused_kernel or chunk <= _CPU_CHUNK]

    def cache_bytes(self) -> int:
        """Keys and values of all rows at the end."""
        return self.rows * (1 + self.branches) * self.row_bytes()

    def row_bytes(self) -> int:
        """Keys and values that all layers have of one row at the end, and what a trace keeps of it."""
        # Without scores there are logits from the prompt's last token on.
        scored = self.length if self.scores else max(self.length - max(self.prompt - 1, 0), 1)
        kept = sum(watcher.kept_bytes(self.length, scored) for watcher in self.watchers)
        return kept + self.config.num_hidden_layers * kv_bytes(self.config, self.length, self.bits, self.itemsize)

    def recomputing_beside(self, chunk: int) -> int:
        """Bytes beside the weights while a row is recomputed: its cache so far, the second one and its workspace."""
        if not 0 < self.recomputed <= self.length:
            return 0
        return replace(self, length=self.recomputed).row_bytes() + self.recomputing(chunk)

    def recomputing(self, chunk: int) -> int:
        """Bytes beside all caches while a row is recomputed, at most `RECOMPUTE_CHUNK` tokens at once."""
        if not 0 < self.recomputed <= self.length:
            return 0
        row = replace(self, length=self.recomputed, rows=1, recomputed=0)
        return row.cache_bytes() + row.workspace(min(chunk, RECOMPUTE_CHUNK))

    @property
    def recomputes_at_its_peak(self) -> bool:
        """Whether recomputing a row takes the most memory."""
        chunk = self.chunk or CHUNKS[-1]
        return self.recomputing_beside(chunk) > self.cache_bytes() + self.workspace(chunk)

    def longest(self, room: float) -> int:
        """The most tokens that fit, 0 if none do; at most the model's context."""
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            if replace(self, length=middle).plan(room).total <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def workspace(self, chunk: int) -> int:
        """Bytes beside weights and cache while the last `chunk` tokens are read, or some are generated behind them."""
        shape = PassShape(self.config, chunk, self.length, self.rows, self.bits, self.itemsize, self.fused_kernel)
        scored = min(chunk, positions_at_once(self.config.vocab_size)) if self.scores else 0
        verified = self.verified if self.rows == 1 else 1
        drawing = drawing_bytes(self.config.vocab_size, self.drawing, self.rows, verified)
        watched = sum(watcher.working_bytes(shape.queries, self.length) for watcher in self.watchers)
        return workspace_bytes(shape, verified * self.rows, scored, drawing) + self.rows * watched


@dataclass(frozen=True)
class EstimatedWorkload(Workload):
    """That of a model of another family, whose kernels are not ours to count: an upper estimate of everything."""

    config: OtherConfig

    def row_bytes(self) -> int:
        return self.config.cache_bytes(self.length)

    def workspace(self, chunk: int) -> int:
        return self.config.working_bytes(chunk, self.length, self.rows, self.itemsize, self.scores)


def plan_together(workloads: Sequence[Workload], room: float) -> Plan:
    """The plan of rows with caches of their own that are read and answered together, as `Workload.plan` of one.

    A chunk is of all prompts together. With it each row that answers reads a token.
    """
    longest = max(workloads, key=lambda workload: workload.length)
    if len(workloads) == 1:
        return longest.plan(room)
    parts = [part for workload in workloads for part in _among(workload, workloads).parts]
    cache = sum(part.cache_bytes() for part in parts)
    # A layer of the rows that come to share arrays exists twice.
    moved = sum(part.cache_bytes() for part in parts if part.shares_slots) // longest.config.num_hidden_layers
    together = replace(longest, rows=len(workloads), drawing=max(each.drawing for each in workloads))
    step = max(together.workspace(1), moved)
    for chunk in longest.chunks():
        tokens = chunk + len(workloads) - 1
        chunks = (max(part.workspace(tokens), part.recomputing(chunk)) for part in parts)
        plan = Plan(longest.weights + draft_weights(workloads), cache, max(step, *chunks), chunk)
        if plan.total <= room:
            break
    return plan


def _among(workload: Workload, others: Sequence[Workload]) -> Workload:
    """The workload with as many slots as it has where its row shares arrays with longer rows of like length."""
    if not workload.shares_slots:
        return workload
    lengths = [
        min(other.length, workload.length + LIKE)
        for other in others
        if other.shares_slots and other.prompt <= workload.length + LIKE
    ]
    return replace(workload, length=max(lengths))


def draft_weights(workloads: Iterable[Workload]) -> int:
    """Bytes of the weights of all draft models, one that several rows share counted once."""
    drafts = (workload.draft for workload in workloads if workload.draft is not None)
    return sum({id(draft.config): draft.weights for draft in drafts}.values())


def recomputed_at_boundary(config: Config) -> int:
    """How many tokens are recomputed where an answer crosses LongRoPE's boundary, 0 without LongRoPE."""
    return 0 if config.longrope is None else config.original_max_position_embeddings + 1


def check_fits(workload: Workload, room: float, *, prompt: int = 0, kept: bool = False) -> Plan:
    """The plan of a workload.

    Raises MemoryLimitError, with the numbers and what would fit, if it exceeds `room` bytes. `prompt`: how many of the
    tokens are the prompt's, the others are an answer's. `kept`: the cache outlives the run, so its bits are not this
    run's to choose. The message has Python's names: `kv_bits=4`.
    """
    plan = workload.plan(room)
    if plan.total <= room:
        return plan
    ways = []
    if workload.draft is not None and (total := replace(workload, draft=None).plan(room).total) <= room:
        ways.append(f"without the draft model it needs {size_text(total)}")
    if workload.watchers and (total := replace(workload, watchers=()).plan(room).total) <= room:
        less = "keep fewer layers, heads or positions"
        ways.append(f"without what the trace keeps and changes it needs {size_text(total)}: {less}")
    for bits in _OFFERED_BITS:
        packed = replace(workload, bits=KVBits(bits, bits))
        if workload.bits is not None and bits >= min(workload.bits.keys, workload.bits.values):
            continue
        if (total := packed.plan(room).total) <= room:
            quality = "" if bits >= _GOOD_BITS else " at a great loss of quality"
            ways.append(f"{'a cache made with ' if kept else ''}kv_bits={bits} needs {size_text(total)}{quality}")
            break
    longest = workload.longest(room)
    if 0 < prompt < longest:
        ways.append(f"max_tokens={longest - prompt} fits")
    elif longest:
        ways.append(f"up to {longest:,} tokens fit")
    elif not ways:
        packed_already = (workload.config.quantization or {}).get("bits", 16) <= 4
        ways.append("take a smaller model" if packed_already else "take a model of fewer bits")
    rows, length = workload.rows, workload.length
    tokens = f"{rows} x {length:,} tokens" if rows > 1 else f"{length:,} tokens"
    parts = f" ({prompt:,} of the prompt, {length - prompt:,} for the answer)" if 0 < prompt < length else ""
    again = f" to recompute {workload.recomputed:,} tokens" if workload.recomputes_at_its_peak else ""
    drafting = "" if workload.draft is None else f" with a draft model's {size_text(workload.draft.weights)}"
    raise MemoryLimitError(
        f"{tokens}{parts} need {size_text(plan.total)} (weights {size_text(plan.weights)}{drafting}, keys and values "
        f"{size_text(plan.cache)}, work{again} {size_text(plan.workspace)}), and {size_text(room)} may be used: "
        f"{', '.join(ways)}, and force=True tries all the same"
    )


def check_room(what: str, parts: Mapping[str, int], way_out: str) -> None:
    """MemoryLimitError if `what` needs more than there is, the sum of its named `parts`; `way_out` says what to do."""
    total, now = sum(parts.values()), machine.room()
    if total > now:
        of_which = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
        raise MemoryLimitError(
            f"{what} needs {size_text(total)} ({of_which}), and {size_text(now)} may be used: {way_out}, "
            "and force=True tries all the same"
        )


def check_length(config: Config, prompt: int) -> None:
    """ContextLengthError unless a prompt of this many tokens leaves room for an answer in the model's context."""
    context = config.max_position_embeddings
    if prompt >= context:
        raise ContextLengthError(
            f"the prompt has {prompt:,} tokens and the model's context is {context:,}; "
            "shorten it or use a model with a longer context",
            prompt,
            context,
        )


def plan_run(
    directory: Path | Checkpoint,
    prompt: int,
    max_tokens: int,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    kv_bits: KVBits | None = None,
    kept: bool = False,
    force: bool = False,
    draft: Path | Checkpoint | None = None,
    verified: int = MAX_DRAFT + 1,
) -> None:
    """Raise MemoryLimitError if the model of `directory`, a prompt of this many tokens and its answer do not fit.

    Only headers are read, so a run that cannot work is refused before anything is loaded. `kept`: the cache outlives
    the run. `force` refuses nothing. `draft`: a draft model's. `verified`: tokens of a step at most. Raises
    ContextLengthError for a prompt that the model's context cannot hold.
    """

    def workload_of(source: Path | Checkpoint) -> Workload:
        workload = Workload.of_directory(source, prompt + max_tokens, dtype=dtype, kv_bits=kv_bits)
        workload = replace(workload, verified=verified)
        crosses = longrope == "auto" and prompt <= workload.config.original_max_position_embeddings
        return workload.crossing() if crosses else workload

    workload = workload_of(directory)
    check_length(workload.config, prompt)
    if draft is not None:
        workload = replace(workload, draft=workload_of(draft))
    check_fits(workload, math.inf if force else machine.room(), prompt=prompt, kept=kept)
