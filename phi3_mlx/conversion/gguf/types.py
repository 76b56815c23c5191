"""The types of a GGUF file: what `--type` names, and which type each tensor gets then.

llama.cpp mixes types in a file: what hurts most when it is rounded gets more bits. Source: llama-quant.cpp,
`llama_tensor_get_type`; Phi-3's fused layers have rules of their own there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .tensor_names import ROUTER


@dataclass(frozen=True)
class FileType:
    """What llama.cpp calls a kind of file: the type of most of its tensors, and its number (`general.file_type`).

    `mix` gives a tensor of a layer another type: from its name without number and ending ("ffn_down"), the layer and
    how many layers there are; None is the usual one.
    """

    kind: str
    number: int
    mix: Callable[[str, int, int], str | None] = lambda *_: None


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is one of the first and last eighth, or every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _q4_k_m(part: str, layer: int, layers: int) -> str | None:
    if part == "attn_qkv":
        return "Q5_K"
    return "Q6_K" if part in ("attn_v", "ffn_down", "ffn_down_exps") and _more_bits(layer, layers) else None


def _q4_k_s(part: str, layer: int, layers: int) -> str | None:
    early = {"attn_v": 4, "ffn_down": layers // 8, "ffn_down_exps": layers // 8}
    return "Q5_K" if layer < early.get(part, 0) else None


def _q5_k_m(part: str, layer: int, layers: int) -> str | None:
    more = part == "attn_qkv" or (part in ("attn_v", "ffn_down", "ffn_down_exps") and _more_bits(layer, layers))
    return "Q6_K" if more else None


def _q3_k_m(part: str, layer: int, layers: int) -> str | None:
    early = {"attn_v": 2, "ffn_down": layers // 16, "ffn_down_exps": layers // 16}
    if layer < early.get(part, 0):
        return "Q5_K"
    return "Q4_K" if part in ("attn_qkv", "attn_v", "attn_output", "ffn_down", "ffn_down_exps") else None


def _q2_k(part: str, layer: int, layers: int) -> str | None:
    return "Q3_K" if part in ("attn_v", "attn_output", "ffn_down", "ffn_down_exps") else None


FILE_TYPES = {
    "f32": FileType("F32", 0),
    "f16": FileType("F16", 1),
    "bf16": FileType("BF16", 32),
    "q8_0": FileType("Q8_0", 7),
    "q6_k": FileType("Q6_K", 18),
    "q5_k_m": FileType("Q5_K", 17, _q5_k_m),
    "q5_k_s": FileType("Q5_K", 16),
    "q5_1": FileType("Q5_1", 9),
    "q5_0": FileType("Q5_0", 8),
    "q4_k_m": FileType("Q4_K", 15, _q4_k_m),
    "q4_k_s": FileType("Q4_K", 14, _q4_k_s),
    "q4_1": FileType("Q4_1", 3),
    "q4_0": FileType("Q4_0", 2),
    "q3_k_m": FileType("Q3_K", 12, _q3_k_m),
    "q2_k": FileType("Q2_K", 10, _q2_k),
}
_NEVER_ROUNDED = (ROUTER, "_norm.weight")  # a router's scores and norms
_AS_THEY_ARE = ("F32", "F16", "BF16", "Q8_0")  # what llama.cpp mixes nothing into
# What takes the place of a K type whose 256 values do not divide a row.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def wanted_kind(name: str, shape: tuple[int, ...], file_type: str, layers: int, *, tied: bool) -> str:
    """The type that the tensor `name` (llama.cpp's) should have in a file of this type, of a model of `layers` layers.

    `tied`: the embedding makes the logits too.
    """
    if len(shape) == 1 or name.endswith(_NEVER_ROUNDED):
        return "F32"
    known = FILE_TYPES[file_type]
    if known.kind in _AS_THEY_ARE:
        return known.kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    if not name.startswith("blk."):
        return known.kind
    _, layer, part, _ = name.split(".")
    return known.mix(part, int(layer), layers) or known.kind


def fitting_kind(kind: str, width: int) -> str:
    """`kind`, or what llama.cpp takes instead where its blocks do not divide a row of this width."""
    if kind in _FALLBACK and width % 256:
        kind = _FALLBACK[kind]
    return "F16" if kind not in ("F32", "F16", "BF16") and width % 32 else kind
