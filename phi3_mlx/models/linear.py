"""Linear layers whose packed form multiplies in the way that is faster on this device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_NEVER = 1 << 30


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
    """`nn.QuantizedLinear` that unpacks its weight for a plain product where that is faster."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < unpacking_pays():
            return super().__call__(x)
        product = unpacked_product(lambda: plain_weight(self))(x)
        return product + self.bias if "bias" in self else product


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` with the same choice where it serves as the output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < unpacking_pays():
            return super().as_linear(x)
        return unpacked_product(lambda: plain_weight(self))(x)


def plain_weight(layer: nn.Module) -> mx.array:
    """The weight of a linear layer or embedding, packed or not, as floats: (outputs, inputs), or one such an expert."""
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


def unpacking_bytes(bits: int, itemsize: int) -> int:
    """Bytes for each number that `mx.dequantize` holds at its peak on the CPU, the result of `itemsize` among them.

    Codes are taken apart in arrays of 32-bit integers, bit by bit if 32 is no multiple of `bits`. As measured, for
    mode "affine"; the others take less.
    """
    return (8 if 32 % bits == 0 else 4 * bits + 4) + itemsize % 4


def matrices(layer: nn.Module) -> Iterator[mx.array]:
    """The same matrix by matrix (outputs, inputs): one, or that of each expert; each unpacked when it is asked for."""
    if layer.weight.ndim == 2:
        yield plain_weight(layer)
        return
    for i in range(len(layer.weight)):
        if "scales" not in layer:
            yield one_of(layer.weight, i)
            continue
        biases = one_of(layer.biases, i) if "biases" in layer else None
        how: dict[str, Any] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        yield mx.dequantize(one_of(layer.weight, i), one_of(layer.scales, i), biases, **how)


def one_of(array: mx.array, i: int) -> mx.array:
    """`array[i]` without the copy that indexing makes."""
    return array[i : i + 1].squeeze(0)


def unpacked_product(unpack: Callable[[], mx.array]) -> Callable[[mx.array], mx.array]:
    """x @ unpack().T, unpacked for the moment, forward and backward: training keeps no such copy between the two."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ unpack().astype(x.dtype).T  # the modes with 8-bit scales unpack to bfloat16

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return cotangent @ unpack().astype(x.dtype)

    return product  # type: ignore[return-value]


def unpacking_pays() -> int:
    """From how many rows on `x @ unpacked.T` is faster than MLX's packed product.

    On a GPU never. On the CPU MLX's packed product takes as long for each row as for the first, a BLAS does not, and
    how good the BLAS is depends on the machine: so both are timed, once.
    """
    return _NEVER if mx.default_device().type == mx.DeviceType.gpu else _measured()


@functools.cache
def _measured() -> int:
    width, rows = 512, 32
    packed = mx.quantize(mx.random.normal((width, width), key=mx.random.key(0)), 32, 4)
    unpacked = mx.dequantize(*packed, 32, 4)
    x = mx.random.normal((rows, width), key=mx.random.key(1))
    mx.eval(packed, unpacked, x)
    row = _seconds(lambda: mx.quantized_matmul(x, *packed, True, 32, 4)) / rows
    plain_row = _seconds(lambda: x @ unpacked.T) / rows
    unpack = _seconds(lambda: mx.dequantize(*packed, 32, 4))
    return max(2, round(unpack / (row - plain_row))) if row > plain_row else _NEVER


def _seconds(function: Callable[[], mx.array], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        mx.eval(function())
        best = min(best, time.perf_counter() - started)
    return best
