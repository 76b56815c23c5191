"""What a conversion takes of memory, reckoned from headers before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..engine import plan
from ..engine.plan import Workload
from ..evaluation.quality import LOGITS_AT_ONCE
from ..models import parse_config
from ..models.attention import fused_attention
from ..models.linear import unpacking_bytes
from ..store.safetensors import Tensor
from . import gptq, sensitivity
from .layerwise import EMBEDDING, TOKENS_AT_ONCE, layer_of
from .sources import Source


def check_conversion(
    source: Source, read: Source, written: Mapping[str, Tensor], ids: Sequence[int], *, measures: bool
) -> None:
    """MemoryLimitError unless `source`, which is cast as `read` says, can become `written`.

    `ids`: of the text that bits or weights are fitted to, if they are; `measures`: bits are chosen by its help.
    """
    one = max(_one_tensor(source, read, written, name) for name in source.tensors)
    fitting = (_measuring(source, len(ids)) if measures else _gptq(source, len(ids))) if ids else 0
    parts = {"a tensor at a time": one, "a layer and a text": fitting}
    plan.check_room(
        f"converting {source.name}",
        parts,
        "take method='round', and bits instead of a target" if ids else "close other programs",
    )


def _one_tensor(source: Source, read: Source, written: Mapping[str, Tensor], name: str) -> int:
    """Bytes of a tensor's parts and itself, unpacked, cast and packed."""
    stored, cast, path = source.tensors[name], read.tensors[name], name.removesuffix(".weight")
    unpacking = unpacking_bytes((source.quantization or {}).get("bits", 4), 4) if source.quantization else 0
    made = sum(written[own].nbytes for own in {name, f"{path}.scales", f"{path}.biases"} if own in written)
    held = max(2 * stored.nbytes, unpacking * math.prod(stored.shape))
    return held + (cast.nbytes if cast.dtype != stored.dtype else 0) + (made if written.get(name) != cast else 0)


def _layer(source: Source) -> tuple[int, int]:
    """Numbers of a layer, and of its largest matrix."""
    first = [tensor.shape for name, tensor in source.tensors.items() if layer_of(name) == 0]
    return sum(map(math.prod, first)), max(math.prod(shape[-2:]) for shape in first)


def _work(source: Source, window: int, tokens: int) -> int:
    config = parse_config(source.config, source.name)
    run = Workload(config, 0, window, max(1, tokens // window), itemsize=4, fused=fused_attention())
    return run.workspace(window)


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
