"""How much memory a run needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx.utils import tree_flatten

from ..config import BlockPattern, Config
from ..errors import MemoryLimitError, PromptError
from ..models.attention import BLOCK, block_of, dequantized_at_once, fused_attention, heads_at_once, on_cuda
from ..models.blocksparse import tile_size
from ..models.cache import REREAD_CHUNK, KVBits, KVCache
from ..models.decoder import QUEUED
from ..models.linear import SLICE, dequantizing_bytes, dequantizing_pays
from ..sizes import size_text
from ..store.checkpoint import model_size
from . import machine

if TYPE_CHECKING:
    from ..models.cache import KVBits
    from ..models.decoder import LongRopeRule, Model

CHUNKS = (2048, 1024, 512, 256, 128, 64)  # prompt tokens read at once, best first
_CPU_CHUNK = 512  # large chunks feed a GPU; on the CPU they only cost memory
_SLICES = SLICE * 17 // 5  # numbers of slices of packed weights that are alive at once on the CPU, as measured
VERIFIED = 17  # tokens of a step at most: the longest draft of prompt lookup, and one
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
    `fused`, whether attention keeps its scores in registers, as on a GPU. `chunk` is how many tokens of a prompt are
    read at once; without it, as many as fit. `ragged`: whether some of the rows are padded. `rereads`: how many tokens
    of a row are recomputed into a second cache if the sequence crosses LongRoPE's boundary; 0: it cannot.
    """

    config: Config
    weights: int
    length: int
    rows: int = 1
    bits: KVBits | None = None
    itemsize: int = 2
    fused: bool = True
    chunk: int | None = None
    rereads: int = 0
    ragged: bool = False

    @classmethod
    def of_model(cls, model: Model, length: int, rows: int = 1, *, kv_bits: KVBits | None = None) -> Workload:
        """For a model in memory, in the dtype and on the device that it is computed in."""
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        return cls(model.config, weights, length, rows, kv_bits, model.dtype.size, fused_attention())

    @classmethod
    def of_directory(
        cls,
        directory: Path,
        length: int,
        *,
        dtype: str | None = None,
        kv_bits: KVBits | None = None,
        fused: bool | None = None,
    ) -> Workload:
        """For a model on disk, as `load_model` would load it; only headers are read.

        A `length` beyond the model's context is cut to it. `fused`: on a GPU or not, this machine's way without it.
        Raises CheckpointError and ConfigError as `load_model` does.
        """
        size = model_size(directory, dtype)
        length = min(length, size.config.max_position_embeddings)
        fused = fused_attention() if fused is None else fused
        return cls(size.config, size.weights, length, bits=kv_bits, itemsize=size.itemsize, fused=fused)

    @classmethod
    def of_release(cls, shape: Config, weights: int, *, fused: bool = True) -> Workload:
        """For a released model with `weights` bytes of weights, one token long; on a GPU, or on the CPU in float32."""
        return cls(shape, weights, 1, itemsize=2 if fused else 4, fused=fused)

    def crossing(self) -> Workload:
        """The same for a prompt that LongRoPE reads with the short factors and an answer that may need the long."""
        return replace(self, rereads=reread_at_boundary(self.config))

    def plan(self, room: float) -> Plan:
        """The plan with the largest prefill chunk that fits `room` bytes, with the smallest if none does."""
        chunks = [self.chunk] if self.chunk else [chunk for chunk in CHUNKS if self.fused or chunk <= _CPU_CHUNK]
        cache = self.cache_bytes()
        works = ((chunk, max(self.workspace(chunk), self._rereading(chunk) - cache)) for chunk in chunks)
        plans = (Plan(self.weights, cache, work, chunk) for chunk, work in works)
        for plan in plans:
            if plan.total <= room:
                break
        return plan

    def cache_bytes(self) -> int:
        """Keys and values of all layers at the end."""
        return self.config.num_hidden_layers * self._layer_bytes(self.length)

    def _rereading(self, chunk: int) -> int:
        """Bytes beside the weights while a row is recomputed, at most `REREAD_CHUNK` tokens at once."""
        if not 0 < self.rereads <= self.length:
            return 0
        row = replace(self, length=self.rereads, rows=1, rereads=0, ragged=False)
        held = row.cache_bytes() if self.rows == 1 else self.cache_bytes()
        return held + row.cache_bytes() + row.workspace(min(chunk, REREAD_CHUNK))

    @property
    def reads_again_at_its_peak(self) -> bool:
        """Whether recomputing a row takes the most memory."""
        chunk = self.chunk or CHUNKS[-1]
        return self._rereading(chunk) > self.cache_bytes() + self.workspace(chunk)

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

    def _layer_bytes(self, length: int) -> int:
        config = self.config
        kept = KVCache.spare + 2 * KVCache.step
        slots = length if config.sliding_window is None else min(length, config.sliding_window - 1 + kept)
        slots = -(-slots // KVCache.step) * KVCache.step
        numbers = self.rows * slots * config.num_key_value_heads * config.head_dim
        if self.bits is None:
            return 2 * numbers * self.itemsize
        scales = 2 * 2 * numbers // self.bits.group_size * self.itemsize  # and biases, of keys and of values
        return numbers * (self.bits.keys + self.bits.values) // 8 + scales

    def workspace(self, chunk: int) -> int:
        """What reading a chunk at the end of the sequence holds beside weights and cache.

        The arrays of a layer, and what one call of attention writes; on a GPU those of layers that wait in its queue.
        A mixture of experts has a row of a token for each of its experts, and begins its MLPs when attention has
        left. A layer's cache is copied when it last grows, while tokens are generated: then those are scored.
        """
        config, tokens = self.config, self.rows * min(chunk, self.length)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        mixing, inner = 3 * (heads + 2 * kv_heads) * dim, (config.mlp_kept + 1) * config.mlp_width
        numbers = config.numbers_in_work + self._norms()
        seen = self.length if config.sliding_window is None else min(self.length, chunk + config.sliding_window)
        attention = self._attention(chunk, seen)
        logits = self._scoring()
        grown = self._layer_bytes(max(self.length - KVCache.step, 0)) + self._decoding(seen)
        if config.experts_per_token > 1:
            rows = tokens * 7 * config.experts_per_token * config.hidden_size * self.itemsize
            # An expert at a time is unpacked, where the one before it was, or slices of it.
            packing = self._unpacking_weights()
            expert = min(config.largest_linear * (packing - self.itemsize), _SLICES * packing)
            unpacked = expert if self._unpacks(tokens) else 0
            routed = tokens * inner * self.itemsize + unpacked
            mixed = tokens * mixing * self.itemsize + attention
            turned = tokens * self._turning() * self.itemsize + attention  # before there are rows of experts
            return max(rows + max(routed, mixed), turned, grown, logits)
        if self._unpacks(tokens):
            # A layer at a time is computed: fewer arrays live at once, but slices of matrices are unpacked. While the
            # last of several is, the parts of the product are joined. Both as measured, on the CPU.
            slices = self._unpacked_slices(config.largest_linear)
            wide = tokens * (3 * config.hidden_size + 7 * config.mlp_width // 2) * self.itemsize + slices
            if config.largest_linear > SLICE:
                joined = tokens * (3 * config.hidden_size + 5 * config.mlp_width) * self.itemsize
                wide = max(wide, joined + slices - SLICE // 2 * self._unpacking_weights())
            numbers -= 2 * (config.hidden_size + config.mlp_width) + (heads + 2 * kv_heads) * dim
            numbers = max(numbers, self._turning())
            return max(tokens * numbers * self.itemsize + attention, wide, grown, logits)
        if self._in_blocks(chunk, seen):  # attention is computed before the MLP is begun
            inside = tokens * (numbers - inner) * self.itemsize + attention
            whole = tokens * max(numbers, self._turning_amid_layers()) * self.itemsize
            return max(whole + self._scores_at_once(chunk, seen), inside, grown, logits)
        layer = tokens * max(numbers, self._turning_amid_layers()) * self.itemsize
        if self.fused:
            layer = min(config.num_hidden_layers, QUEUED // layer + 1) * layer
        return max(layer + attention, grown, logits)

    def _norms(self) -> int:
        """Numbers of a token that the norms hold beside the others: on the CPU they copy 16-bit ones into float32."""
        return 0 if self.fused or self.itemsize == 4 else 10 * self.config.hidden_size

    def _turning(self) -> int:
        """Numbers of a token while queries are turned on the CPU, which MLX does in ten operations on their halves."""
        if self.fused:
            return 0
        config = self.config
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return 2 * config.hidden_size + self._norms() + (queries + 2 * keys) + 11 * queries // 2

    def _turning_amid_layers(self) -> int:
        """The same where feed-forward parts before and after are computed without a wait."""
        config = self.config
        return 0 if self.fused else self._turning() + 5 * config.hidden_size + 12 * config.mlp_width // 5

    def _scores_at_once(self, chunk: int, seen: int) -> int:
        """Bytes of the scores of a chunk that are not computed in blocks on the CPU, the most of them."""
        queries = min(chunk, self.length)
        a_key = self.rows * self.config.num_attention_heads * queries
        keys = min(seen, BLOCK // a_key // queries * queries)
        # Those that a mask has hidden are there once more.
        return 0 if self.bits else self.itemsize * a_key * keys * (2 if self._is_masked(keys) else 1)

    def _is_masked(self, seen: int) -> bool:
        """Whether the mask of this many keys is an array: where a window or padding hides some."""
        window = self.config.sliding_window
        return self.ragged or (window is not None and seen > window)

    def _scoring(self) -> int:
        """Logits of a step, in float32, and what of the output layer is unpacked for as many tokens."""
        logits = 2 * self.rows * self.config.vocab_size * 4
        if not self._unpacks(VERIFIED if self.rows == 1 else self.rows):
            return logits
        return logits + self._unpacked_slices(self.config.vocab_size * self.config.hidden_size)

    def _unpacked_slices(self, numbers: int) -> int:
        """What is alive on the CPU of a packed matrix that is multiplied slice by slice."""
        return min(2 * numbers, 2 * SLICE + numbers // 2, _SLICES) * self._unpacking_weights()

    def _attention(self, chunk: int, seen: int) -> int:
        """What a call of attention to `seen` keys writes, the largest of the layers'."""
        pattern = self.config.sparse_layers
        dense = any(map(self.config.is_dense, range(self.config.num_hidden_layers)))
        if pattern is None or self.length <= pattern.reach:
            return self._dense_attention(chunk, seen)
        if dense:
            return max(self._dense_attention(chunk, seen), self._sparse_attention(chunk, pattern))
        # Up to the pattern's reach they are dense; what the cache takes more in the end was free then.
        later = self.cache_bytes() - replace(self, length=pattern.reach).cache_bytes()
        return max(self._dense_attention(chunk, pattern.reach) - later, self._sparse_attention(chunk, pattern))

    def _dense_attention(self, chunk: int, seen: int) -> int:
        config, queries = self.config, min(chunk, self.length)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if self.fused:
            if self.bits is not None:
                return self._some_heads(seen)
            # As measured on CUDA, a chunk behind others took its scores too; one that is the first did not.
            behind = on_cuda() and 1 < queries < seen
            return self.rows * heads * queries * seen * self.itemsize if behind else 0
        masked = self.rows * queries * seen if self._is_masked(seen) else 0
        at_once = self._scores_at_once(chunk, seen)
        if not self._in_blocks(chunk, seen):
            return at_once + masked
        rows, slots = block_of(heads // kv_heads)
        rows, slots = min(rows, queries), min(slots, kv_heads * seen)
        numbers = slots * dim if self.bits else 0  # of the keys of a block that are unpacked, and of the values
        scores = 4 * heads // kv_heads * rows * slots
        keys, values = self._unpacking()
        scored = 2 * scores if self.itemsize == 4 else 7 * scores // 2  # in float32, and in 16 bits before and after
        block = max(numbers * keys, numbers * (self.itemsize + values), 2 * numbers * self.itemsize + scored)
        return max(block, at_once) + masked

    def _some_heads(self, seen: int) -> int:
        """Heads of a packed cache unpacked on a GPU, from a copy: a part of an array is not in one piece."""
        head, kv_heads = self.rows * seen * self.config.head_dim, self.config.num_key_value_heads
        numbers = min(kv_heads * head, max(head, dequantized_at_once()))
        return 2 * numbers * self.itemsize + self._layer_bytes(seen) * numbers // (kv_heads * head)

    def _decoding(self, seen: int) -> int:
        """Scores of the tokens that are generated, or drafted and verified at once; of those of a call's heads."""
        kv_heads, queries = self.config.num_key_value_heads, VERIFIED if self.rows == 1 else self.rows
        queries *= self.config.num_attention_heads // kv_heads
        if self.bits is None:
            return 0 if self.fused else 4 * queries * kv_heads * seen
        if self.fused and on_cuda():
            return self._some_heads(seen)
        return (4 + self.itemsize) * queries * min(kv_heads, heads_at_once(queries, seen, self.fused)) * seen

    def _in_blocks(self, chunk: int, seen: int) -> bool:
        """Whether attention is computed block by block, each before the next is asked for."""
        every = self.rows * self.config.num_attention_heads * min(chunk, self.length) * seen
        return not self.fused and (self.bits is not None or every > BLOCK)

    def _sparse_attention(self, chunk: int, pattern: BlockPattern) -> int:
        """A tile's copied keys and values and, on the CPU, its scores; four of each were alive at once."""
        config = self.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries, keys, heads, kv_heads = tile_size(self.rows, heads, kv_heads, chunk, self.length, pattern)
        numbers, of_each = self.rows * kv_heads * keys * dim, 8 * self.itemsize
        if self.bits is not None:
            of_each = max(of_each, sum(self._unpacking()))
        scores = 0 if self.fused else 4 * self.rows * heads * queries * keys * 4
        return numbers * of_each + scores

    def _unpacking(self) -> tuple[int, int]:
        """Bytes for a number of packed keys and one of values while they are unpacked."""
        if self.bits is None or self.fused:
            return self.itemsize, self.itemsize
        return dequantizing_bytes(self.bits.keys, self.itemsize), dequantizing_bytes(self.bits.values, self.itemsize)

    def _unpacking_weights(self) -> int:
        """The same for the packed weights that take most."""
        packed = self.config.quantization or {}
        each = [packed, *(own for own in packed.values() if isinstance(own, Mapping))]
        return max(dequantizing_bytes(own.get("bits", 4), self.itemsize) for own in each)

    def _unpacks(self, tokens: int) -> bool:
        """Whether packed weights are multiplied as floats."""
        return not self.fused and self.config.quantization is not None and tokens >= dequantizing_pays()


def reread_at_boundary(config: Config) -> int:
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
    again = f" to recompute {workload.rereads:,} tokens" if workload.reads_again_at_its_peak else ""
    raise MemoryLimitError(
        f"{tokens}{parts} need {size_text(plan.total)} (weights {size_text(plan.weights)}, keys and values "
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
    """PromptError unless a prompt of this many tokens leaves room for an answer in the model's context."""
    context = config.max_position_embeddings
    if prompt >= context:
        raise PromptError(
            f"the prompt has {prompt:,} tokens and the model's context is {context:,}; "
            "shorten it or use a model with a longer context"
        )


def plan_run(
    directory: Path,
    prompt: int,
    max_tokens: int,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    kv_bits: KVBits | None = None,
    kept: bool = False,
    force: bool = False,
) -> None:
    """Raise MemoryLimitError if the model of `directory`, a prompt of this many tokens and its answer do not fit.

    Only headers are read, so a run that cannot work is refused before anything is loaded. `kept`: the cache outlives
    the run. `force` refuses nothing. Raises PromptError for a prompt that the model's context cannot hold.
    """
    workload = Workload.of_directory(directory, prompt + max_tokens, dtype=dtype, kv_bits=kv_bits)
    check_length(workload.config, prompt)
    if longrope == "auto" and prompt <= workload.config.original_max_position_embeddings:
        workload = workload.crossing()
    check_fits(workload, math.inf if force else machine.room(), prompt=prompt, kept=kept)
