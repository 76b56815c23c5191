"""The memory that converting, and merging an adapter, take, computed from headers before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..engine import machine, plan
from ..engine.plan import Workload
from ..engine.sampler import numbers_drawn
from ..engine.sampling import Sampling
from ..evaluation.quality import LOGITS_AT_ONCE
from ..models.attention import fused_attention
from ..models.experts import padded_block
from ..models.linear import dequantizing_bytes, most_dequantizing_bytes
from ..sizes import size_text
from ..store.checkpoint import Checkpoint, target_dtype
from ..store.quantization import FLOATS
from . import calibrating, endtoend, sensitivity
from .adapted import AdaptedSource
from .effect import EFFECT_LOGITS, EFFECT_TOKENS
from .gptq import ROWS_AT_ONCE
from .layerwise import EMBEDDING, TOKENS_AT_ONCE, layer_of
from .layout import Entry, Layout
from .measured import FITTED_TOKENS
from .own_text import OWN_LENGTH, TEMPERATURE
from .rounding import quantizing_bytes
from .sources import Source, to_mlx
from .teacher import KEPT
from .unfinished import DiskUse

# Beside a matrix that an adapter changes: float32 copies of it that are alive at once, as measured.
_CHANGE, _CHANGE_DORA = 1.0, 3.0  # the product of its factors; and what the length of rows is computed of
# Matrices of inputs x inputs that GPTQ has at once: the Hessian and the shift of the rows fitted and of those held out,
# the sum of the Hessians, damped and factored, and a copy of it. Of each expert but one, the first four.
_MOMENTS = 8
_MOMENTS_OF_EXPERT = 4
_OWED = 3  # of outputs x inputs: what outputs owe the residual stream, of the rows fitted, those held out, and all
# Of the vocabulary x hidden: an embedding twice, with what rounds some of its rows; a head of its own with its target,
# which is what it lacks on the rows fitted and on those held out, a change and its products.
_EMBEDDING_COPIES, _ROUNDED_ROWS, _HEAD_ALONE = 2, 6, 8
# Where bits are measured by GPTQ's errors: of each matrix its Hessian, that with what other experts' tokens add, and
# the factor, and four copies while that is made; and of the text that it is fitted to, before a layer, behind it in
# parts, and whole.
_FACTORED, _FACTORING, _FITTED_TEXT = 3, 4, 3
# Arrays of experts' rows that are alive while a text goes through a layer, padded, and kept to compare widths.
_ROWS_OF_EXPERTS = 8
# Of distillation: copies of what is trained (it, its best, gradients, two moments, the next), of a layer in
# floats and of the head (matrix, gradient, integers), of a step's logits, and of the hidden states between layers.
_TRAINED_COPIES, _COPIES_IN_FLOATS, _LOGITS, _KEPT_BETWEEN = 6, 3, 6, 3
_CHECKPOINT_COPIES = 4  # of what is trained: it, its best, two moments
_MARGIN = 1.1  # for the factors themselves and what else is small
_NOTHING: Mapping[str, int] = {}


def check_conversion(
    source: Source, checked: Source, layout: Layout, tokens: int, *, measures: bool, rounds: bool
) -> None:
    """MemoryLimitError unless `source`, cast to the dtypes of `checked`, can be written in `layout`.

    `tokens`: of the text that bits or rounding are fitted to, 0 if neither is; `measures`: the bits are, `rounds`: GPTQ
    rounds.
    """
    tensor = max(_one_tensor(source, checked, entry) for entry in layout.entries)
    measuring = _measuring(source, tokens, rounds) if measures else 0
    fitting = max(measuring, _gptq(source, tokens) if rounds else 0)
    parts = {"a tensor at a time": tensor, "a layer and a text": fitting}
    plan.check_room(
        f"converting {source.name}",
        parts,
        "take method='round', and bits instead of a target" if tokens else "close other programs",
    )


def check_own_text(source: Source, beside: Mapping[str, int] = _NOTHING) -> None:
    """MemoryLimitError unless the model of `source`, in floats, fits beside what one text that it writes takes.

    `beside`: what else is in memory meanwhile, in bytes.
    """
    parts = {**_writing(source), **beside}
    plan.check_room(f"letting {source.name} write a text", parts, "give one: calibration=FILE")


def _writing(source: Source) -> dict[str, int]:
    """What a model takes to write a text, by what for; others wait where there is no room for several."""
    dtype = target_dtype(None)
    sizes = [
        tensor.nbytes if dtype is None else dtype.size * math.prod(tensor.shape) for tensor in source.tensors.values()
    ]
    dequantizing = most_dequantizing_bytes(source.quantization, 4) if source.quantization else 0
    stored = max(int(max(tensor.nbytes, dequantizing * math.prod(tensor.shape))) for tensor in source.tensors.values())
    drawing = numbers_drawn(Sampling(temperature=TEMPERATURE))
    workload = Workload.of_release(source.config, sum(sizes), fused_kernel=fused_attention())
    length = min(OWN_LENGTH, source.config.max_position_embeddings)
    itemsize = max(to_mlx(tensor.dtype).size for tensor in source.tensors.values()) if dtype is None else dtype.size
    made = replace(workload, length=length, drawing=drawing, itemsize=itemsize).plan(machine.room())
    return {"weights": made.weights, "keys and values": made.cache, "work": max(made.workspace, stored)}


def check_training(source: Source, layout: Layout, text_tokens: int, beside: Mapping[str, int] = _NOTHING) -> None:
    """MemoryLimitError unless the model that `source` becomes in `layout` can be trained on a text of that length.

    `beside`: what else is in memory meanwhile, in bytes.
    """
    parts = {**_training(source, layout, text_tokens), **beside}
    plan.check_room(f"training all layers of {source.name}", parts, "take method='gptq'")


def _training(source: Source, layout: Layout, text_tokens: int) -> dict[str, int]:
    """What training the packed model on a text takes, by what for."""
    config = source.config
    floats, matrix = _layer(source)
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    tokens = endtoend.ROWS * calibrating.GPTQ_WINDOW
    logits = _LOGITS * tokens * vocab
    between = _KEPT_BETWEEN * tokens * hidden * config.num_hidden_layers
    layer = _COPIES_IN_FLOATS * floats + 2 * matrix
    head = _COPIES_IN_FLOATS * vocab * hidden
    return {
        "weights": layout.nbytes,
        "training": _TRAINED_COPIES * _trained(layout),
        "a text's distributions": _distributions(text_tokens, vocab),
        "activations": 4 * (between + max(layer + _work(source, calibrating.GPTQ_WINDOW, tokens), logits + head)),
    }


def _trained(layout: Layout) -> int:
    """Bytes of what is trained: two numbers of each group, in float32."""
    packed = [entry for entry in layout.entries if entry.packing is not None]
    return 4 * 2 * sum(math.prod(entry.stored[f"{entry.path}.scales"].shape) for entry in packed)


def _distributions(tokens: int, vocab: int) -> int:
    """Bytes of the source's distributions: of each of their tokens an id and a log-probability."""
    return 8 * tokens * min(KEPT, vocab)


def kept_on_disk(source: Source, layout: Layout, nbytes: int, tokens: int, method: str) -> DiskUse:
    """What a run keeps until a model of `nbytes`, by `method` and a text of `tokens`, is there."""
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    text = 4 * 2 * tokens * hidden  # in the source and in the packed model
    if method != "distill":
        return DiskUse(nbytes, text)
    return DiskUse(nbytes, text, _distributions(tokens, vocab), _CHECKPOINT_COPIES * _trained(layout))


def check_fusion(
    folder: Path, base: Checkpoint, source: AdaptedSource, layout: Layout, adapter_bytes: int, tokens: int
) -> Mapping[str, int]:
    """MemoryLimitError unless `source` can be written in `layout`, and the effect that its adapters keep be measured.

    `folder`: the adapter's, whose tensors take `adapter_bytes`; `base`: what it changes; `tokens`: of the text that
    GPTQ reads, 0 without it. The result is what stays in memory while the model is made.
    """
    kept = {"the adapter": adapter_bytes}
    writing = {"a matrix at a time": _one_matrix(source, layout)}
    least = size_text(adapter_bytes + sum(writing.values()))
    if tokens:
        writing["a layer and a text"] = _gptq(source, tokens)
    if not source.rounds_adapters:
        plan.check_room(f"fusing {folder}", kept | writing, "free some")
        return kept
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
    kept["a text's log-probabilities"] = 4 * workload.length * workload.config.vocab_size
    plan.check_room(
        f"measuring what is left of {folder}",
        max(measuring, kept | writing, key=lambda parts: sum(parts.values())),
        f"dequantize=True measures nothing and needs {least}",
    )
    return kept


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
    """The source's layer and the packed one in float32, the text before, in and after both, and a matrix's moments."""
    layer, matrix = _layer(source)
    width, experts = _widest(source)
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    moments = _MOMENTS + _MOMENTS_OF_EXPERT * (experts - 1)
    fitting = 2 * layer + (1 + _OWED) * matrix + moments * width * width
    config = source.config
    mixed = 2 * tokens * config.num_attention_heads * config.head_dim  # by attention, in both layers
    ends = (_EMBEDDING_COPIES * vocab + _ROUNDED_ROWS * min(vocab, ROWS_AT_ONCE)) * hidden
    if not config.tie_word_embeddings:
        ends = max(ends, _HEAD_ALONE * vocab * hidden)
    numbers = max(fitting, ends) + 4 * tokens * hidden + mixed
    return 4 * numbers + _work(source, calibrating.GPTQ_WINDOW, min(tokens, TOKENS_AT_ONCE))


def _measuring(source: Source, text: int, rounds: bool) -> int:
    """A layer in float32, the activations that follow from rounding each matrix, and logits.

    Where GPTQ `rounds`, also what it takes for a matrix, and the text that it is fitted to before and after a layer.
    """
    tokens = min(text, sensitivity.TOKENS)
    layer, matrix = _layer(source)
    vocab, hidden = source.tensors[f"{EMBEDDING}.weight"].shape
    moved = 4 * tokens * hidden * sum(len(tensor.shape) > 1 for tensor in source.tensors.values())
    moved = min(moved, max(sensitivity.ACTIVATION_BYTES, moved * sensitivity.SENSITIVITY_WINDOW // max(tokens, 1)))
    width, experts = _widest(source)
    inside = layer + 2 * experts * matrix  # all experts of a layer are rounded at once
    if experts > 1:  # whose rows are padded to blocks, and are kept for comparing widths
        rows = tokens * source.config.experts_per_token
        inside += _ROWS_OF_EXPERTS * (rows + experts * padded_block(rows, experts)) * width
    ends = 3 * vocab * hidden + 5 * min(LOGITS_AT_ONCE, tokens * vocab)
    read = tokens
    if rounds:
        fitted = min(text, FITTED_TOKENS)
        inside += _ROUNDED_ROWS * matrix + (_FACTORING + _FACTORED * experts) * width * width
        ends += _ROUNDED_ROWS * min(vocab, ROWS_AT_ONCE) * hidden
        moved += 4 * _FITTED_TEXT * fitted * hidden
        read = max(read, min(fitted, TOKENS_AT_ONCE))
    return 4 * max(inside, ends) + moved + _work(source, sensitivity.SENSITIVITY_WINDOW, read)


def _widest(source: Source) -> tuple[int, int]:
    """The most inputs that a matrix of a layer has, and the experts of a layer, 1 without any."""
    shapes = [tensor.shape for name, tensor in source.tensors.items() if layer_of(name) == 0]
    return max(shape[-1] for shape in shapes), max(math.prod(shape[:-2]) for shape in shapes)
