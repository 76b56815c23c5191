"""The memory that converting, and merging an adapter, take, computed from headers before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..engine import plan
from ..engine.plan import Workload
from ..evaluation.quality import LOGITS_AT_ONCE
from ..models.attention import fused_attention
from ..models.linear import dequantizing_bytes, most_dequantizing_bytes
from ..sizes import size_text
from ..store.checkpoint import Checkpoint
from ..store.quantization import FLOATS
from . import gptq, sensitivity
from .adapted import AdaptedSource
from .effect import EFFECT_LOGITS, EFFECT_TOKENS
from .layerwise import EMBEDDING, TOKENS_AT_ONCE, layer_of
from .layout import Entry, Layout
from .rounding import quantizing_bytes
from .sources import Source

# Beside a matrix that an adapter changes: float32 copies of it that are alive at once, as measured.
_CHANGE, _CHANGE_DORA = 1.0, 3.0  # the product of its factors; and what the length of rows is computed of
_MARGIN = 1.1  # for the factors themselves and what else is small


def check_conversion(source: Source, checked: Source, layout: Layout, ids: Sequence[int], *, measures: bool) -> None:
    """MemoryLimitError unless `source`, cast to the dtypes of `checked`, can be written in `layout`.

    `ids`: of the text that bits or rounding are fitted to, empty if neither is; `measures`: it is the bits.
    """
    tensor = max(_one_tensor(source, checked, entry) for entry in layout.entries)
    fitting = (_measuring(source, len(ids)) if measures else _gptq(source, len(ids))) if ids else 0
    parts = {"a tensor at a time": tensor, "a layer and a text": fitting}
    plan.check_room(
        f"converting {source.name}",
        parts,
        "take method='round', and bits instead of a target" if ids else "close other programs",
    )


def check_fusion(folder: Path, base: Checkpoint, source: AdaptedSource, layout: Layout, adapter_bytes: int) -> None:
    """MemoryLimitError unless `source` can be written in `layout`, and the effect that its adapters keep be measured.

    `folder`: the adapter's, whose tensors take `adapter_bytes`; `base`: what it changes.
    """
    writing = {"the adapter": adapter_bytes, "a matrix at a time": _one_matrix(source, layout)}
    if not source.rounds_adapters:
        plan.check_room(f"fusing {folder}", writing, "free some")
        return
    workload = Workload.of_directory(base, EFFECT_TOKENS)
    logits = EFFECT_LOGITS * 4 * workload.length * workload.config.vocab_size
    merged = sum(
        math.prod(tensor.shape) * workload.itemsize if tensor.dtype in FLOATS else tensor.nbytes
        for tensor in layout.stored.values()
    )
    measuring = {
        "weights": max(workload.weights, merged),
        "work": max(workload.workspace(workload.length), int(logits)),
        "the adapter": 2 * adapter_bytes,  # what is written, and what is measured
    }
    least = size_text(sum(writing.values()))
    plan.check_room(
        f"measuring what is left of {folder}",
        max(measuring, writing, key=lambda parts: sum(parts.values())),
        f"dequantize=True measures nothing and needs {least}",
    )


def _one_matrix(source: AdaptedSource, layout: Layout) -> int:
    """Bytes that the largest tensor of a merged model takes to make."""
    return max(_merged_tensor(source, entry) for entry in layout.entries)


def _merged_tensor(source: AdaptedSource, entry: Entry) -> int:
    """Bytes of a tensor as it is stored and written, and between them in float32 where it is changed or dequantized."""
    stored, packing = source.base.stored[entry.name], source.base.packings.get(entry.name)
    adapter = source.adapters.get(entry.path)
    if entry.name in source.blocks or (adapter is None and packing is None):
        return entry.nbytes + (stored.nbytes if entry.tensor.dtype != stored.dtype and packing is None else 0)
    numbers = math.prod(entry.tensor.shape)
    nbytes: float = numbers * (4 if packing is None else dequantizing_bytes(packing["bits"], 4))
    if stored.dtype != "F32":
        nbytes += stored.nbytes
    if adapter is not None:
        nbytes += 4 * numbers * (_CHANGE_DORA if adapter.is_dora else _CHANGE)
    if entry.packing is not None:
        nbytes += quantizing_bytes(numbers, entry.packing)
    if entry.packing is not None or entry.tensor.dtype != "F32":
        nbytes += entry.nbytes
    return int(_MARGIN * nbytes)


def _one_tensor(source: Source, checked: Source, entry: Entry) -> int:
    """Bytes of a tensor and its parts: read, dequantized, cast and quantized."""
    stored, cast = source.tensors[entry.name], checked.tensors[entry.name]
    dequantizing = most_dequantizing_bytes(source.quantization, 4) if source.quantization else 0
    held = max(2 * stored.nbytes, dequantizing * math.prod(stored.shape))
    return held + (cast.nbytes if cast.dtype != stored.dtype else 0) + (entry.nbytes if entry.packing else 0)


def _layer(source: Source) -> tuple[int, int]:
    """Numbers of a layer, and of its largest matrix."""
    first = [tensor.shape for name, tensor in source.tensors.items() if layer_of(name) == 0]
    return sum(map(math.prod, first)), max(math.prod(shape[-2:]) for shape in first)


def _work(source: Source, window: int, tokens: int) -> int:
    """Bytes beside its weights that a layer, in float32, takes to read `tokens` tokens in windows."""
    workload = Workload.of_release(source.config, 0, fused_kernel=fused_attention())
    return replace(workload, length=window, rows=max(1, tokens // window), itemsize=4).workspace(window)


def _gptq(source: Source, tokens: int) -> int:
    """A layer in float32, the text before and after it, and of a matrix its inputs' Hessian in three forms."""
    layer, matrix = _layer(source)
    width = max(tensor.shape[-1] for name, tensor in source.tensors.items() if layer_of(name) == 0)
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    numbers = max(layer + matrix + 3 * width * width, 2 * vocab * hidden) + 2 * tokens * hidden
    return 4 * numbers + _work(source, gptq.GPTQ_WINDOW, min(tokens, TOKENS_AT_ONCE))


def _measuring(source: Source, tokens: int) -> int:
    """A layer in float32, the activations that follow from rounding each matrix, and logits."""
    tokens = min(tokens, sensitivity.TOKENS)
    layer, matrix = _layer(source)
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    moved = 4 * tokens * hidden * sum(len(tensor.shape) > 1 for tensor in source.tensors.values())
    moved = min(moved, max(sensitivity.ACTIVATION_BYTES, moved * sensitivity.SENSITIVITY_WINDOW // max(tokens, 1)))
    numbers = max(layer + 2 * matrix, 3 * vocab * hidden + 5 * min(LOGITS_AT_ONCE, tokens * vocab))
    return 4 * numbers + moved + _work(source, sensitivity.SENSITIVITY_WINDOW, tokens)
