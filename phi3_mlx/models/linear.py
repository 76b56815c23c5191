"""Linear layers whose packed form multiplies in the way that is faster on this device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import blas

SLICE = 1 << 19  # numbers of a packed weight that are dequantized at a time
# Rows from which on dequantizing is no slower, by the bytes of a number: `python -m bench.dequantizing`, 2026-11-29 in
# bench/LOG.md. In 16 bits MLX's CPU backend takes eight times as long for a packed product, and rounds more.
DEQUANTIZED_ROWS = {4: 8, 2: 2}
# Numbers of a weight times rows beyond which it is no slower: to dequantize, however little, takes a dozen operations.
DEQUANTIZED_WORK = {4: 1 << 18, 2: 1 << 15}
_NEVER = 1 << 30
# Numbers of slices that are alive at once in `dequantized_product`, 3.4 of them, with MLX's CPU backend ten operations
# ahead: 3.7 where a product runs alone in 3 bits, 2 in 4 and 3 in 8 (bench/LOG.md, "One kernel at a time").
SLICES_ALIVE = SLICE * 17 // 5


class Linear(nn.Linear):
    """`nn.Linear`, packed into a `QuantizedLinear` of ours."""

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: object
    ) -> nn.QuantizedLinear:
        packed = super().to_quantized(group_size, bits, mode)
        packed.__class__ = QuantizedLinear  # the parameters are the same; only the call differs
        return packed


class Embedding(nn.Embedding):
    """`nn.Embedding`, packed into a `QuantizedEmbedding` of ours."""

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: object
    ) -> nn.QuantizedEmbedding:
        packed = super().to_quantized(group_size, bits, mode)
        packed.__class__ = QuantizedEmbedding
        return packed


class QuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` that dequantizes its weight for a plain product where that is faster."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < dequantizing_pays(x.dtype.size, len(self.scales) * x.shape[-1]):
            return super().__call__(x)
        product = dequantized_product(self.weight, self.scales, self.get("biases"), **packing_of(self))(x)
        return product + self.bias if "bias" in self else product


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` with the same choice where it serves as the output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < dequantizing_pays(x.dtype.size, len(self.scales) * x.shape[-1]):
            return super().as_linear(x)
        return dequantized_product(self.weight, self.scales, self.get("biases"), **packing_of(self))(x)


def packing_of(layer: nn.Module) -> dict[str, Any]:
    """How a layer is packed, as MLX's functions ask for it."""
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def plain_weight(layer: nn.Module) -> mx.array:
    """The weight of a linear layer or embedding, packed or not, as floats: (outputs, inputs), or one such an expert."""
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **packing_of(layer))


def dequantizing_bytes(bits: int, itemsize: int) -> int:
    """Bytes for each number that `mx.dequantize` holds at its peak on the CPU, the result of `itemsize` among them.

    Codes are taken apart in arrays of 32-bit integers, bit by bit if 32 is no multiple of `bits`. As measured, for
    mode "affine"; the others take less.
    """
    return (8 if 32 % bits == 0 else 4 * bits + 4) + itemsize % 4


def most_dequantizing_bytes(quantization: Mapping[str, Any] | None, itemsize: int) -> int:
    """`dequantizing_bytes` of the layers that take most; a config's `quantization` may give a layer its own bits."""
    packings = [{}] if quantization is None else [quantization]
    packings += [value for value in packings[0].values() if isinstance(value, Mapping)]
    return max(dequantizing_bytes(packing.get("bits", 4), itemsize) for packing in packings)


def matrices(layer: nn.Module) -> Iterator[mx.array]:
    """The weight as floats, matrix by matrix (outputs, inputs): one, or one an expert, each when it is asked for."""
    if layer.weight.ndim == 2:
        yield plain_weight(layer)
        return
    for i in range(len(layer.weight)):
        if "scales" not in layer:
            yield one_of(layer.weight, i)
            continue
        biases = one_of(layer.biases, i) if "biases" in layer else None
        yield mx.dequantize(one_of(layer.weight, i), one_of(layer.scales, i), biases, **packing_of(layer))


def one_of(array: mx.array, i: int) -> mx.array:
    """`array[i]` without the copy that indexing makes."""
    return array[i : i + 1].squeeze(0)


def dequantized_product(
    weight: mx.array, scales: mx.array, biases: mx.array | None, **packing: Any
) -> Callable[[mx.array], mx.array]:
    """x @ weight.T of a packed weight (outputs, inputs), forward and backward, a slice at a time.

    A slice (`SLICE` numbers) stays in the processor's cache and is soon freed. A whole matrix takes more time and many
    times the memory, and training would keep it from the forward pass to the backward one.
    """
    outputs, groups = scales.shape
    group_words = weight.shape[1] // groups  # 32-bit words that hold the codes of a group

    def dequantized(rows: slice, columns: slice, dtype: mx.Dtype, before: list[mx.array]) -> mx.array:
        """The weight's part of some rows and some groups of columns."""
        first, last, _ = columns.indices(groups)
        part = [weight[rows, first * group_words : last * group_words], scales[rows, columns]]
        part += [] if biases is None else [biases[rows, columns]]
        if before:  # keeps MLX from dequantizing all of them first
            part = mx.depends(part, before[-1:])
        offsets = part[2] if len(part) > 2 else None
        return mx.dequantize(part[0], part[1], offsets, **packing).astype(dtype)  # "mxfp4" and such give bfloat16

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        step = max(1, SLICE // x.shape[-1])
        parts: list[mx.array] = []
        for first in range(0, outputs, step):
            parts.append(x @ dequantized(slice(first, first + step), slice(None), x.dtype, parts).T)
        return mx.concatenate(parts, axis=-1)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        step = max(1, SLICE * groups // (outputs * x.shape[-1]))
        parts: list[mx.array] = []
        for first in range(0, groups, step):
            parts.append(cotangent @ dequantized(slice(None), slice(first, first + step), x.dtype, parts))
        return mx.concatenate(parts, axis=-1)

    return product  # type: ignore[return-value]


def slices_bytes(numbers: int, dequantizing: int) -> int:
    """Bytes that `dequantized_product` holds of a matrix of `numbers` at its peak, `dequantizing` bytes for each.

    Of a small matrix twice itself, of a large one the slices that are alive; between them two slices and half of it.
    """
    return min(2 * numbers, 2 * SLICE + numbers // 2, SLICES_ALIVE) * dequantizing


def dequantizes(
    tokens: int, numbers: int, quantization: Mapping[str, Any] | None, itemsize: int, fused_kernel: bool
) -> bool:
    """Whether a packed matrix of `numbers` is dequantized for this many tokens; never on a GPU (`fused_kernel`)."""
    return not fused_kernel and quantization is not None and tokens >= dequantizing_pays(itemsize, numbers)


def dequantizing_pays(itemsize: int, numbers: int) -> int:
    """From how many rows on `x @ dequantized.T` is faster than MLX's packed product.

    `itemsize`: bytes of a number; `numbers`: of the matrix. Never on a GPU or with the reference BLAS; else from
    `DEQUANTIZED_ROWS` on, if there is more to do than `DEQUANTIZED_WORK`: a packed product takes as long for each row
    as for the first, and more rows cost little once a weight is dequantized. No clock is read, so that two processes
    choose alike and a plan says what a run does.
    """
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if on_gpu or not blas.is_fast():
        return _NEVER
    return max(DEQUANTIZED_ROWS[itemsize], DEQUANTIZED_WORK[itemsize] // numbers + 1)
