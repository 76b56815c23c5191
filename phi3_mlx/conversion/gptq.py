"""GPTQ: rounding that makes up for its own error (Frantar et al. 2023, arXiv 2210.17323), in MLX's affine format.

A weight's columns are rounded one after another; what rounding a column does to the layer's outputs on a text is
compensated by changing the columns that are still to come. The inputs are those that the layer
will really get: they went through the layers packed before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, OptionError
from ..store.finite import is_finite
from .layerwise import EMBEDDING, LayerStream, layer_of, linear
from .layout import Entry, Layout, Rounder
from .sources import Source, to_mlx
from .texts import windows

GPTQ_WINDOW = 256
_DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
_ROWS_AT_ONCE = 8192  # of a weight at a time: they do not depend on each other
_SHRINKS = tuple(1 - 0.05 * i for i in range(9))  # of a group's range, tried for the least error


def calibrated(source: Source, layout: Layout, ids: Sequence[int], *, window: int = GPTQ_WINDOW) -> Rounder:
    """The rounder of `source` whose errors change its outputs on a text least.

    `ids`: the token ids of the text, read in windows of `window`. The more of it, and the more like what the model will
    read, the better. In memory: one layer in float32, the text's activations, and for a layer of n inputs three
    matrices of n x n. An embedding that is also the head is rounded for both tasks, for which the model in floats runs
    first. For an embedding that is only looked up, each group gets the grid of least error.

    Raises OptionError for a layout that is not affine throughout, PromptError for a text shorter than one window, and
    while it runs CheckpointError for weights or activations that are not finite.
    """
    mode = next((packing["mode"] for packing in layout.packings.values() if packing["mode"] != "affine"), None)
    if mode is not None:
        raise OptionError(f"method gptq rounds to affine grids, not {mode}; leave out one of the two")
    return _Calibration(LayerStream(source), layout, windows(ids, window))


class _Calibration:
    """Follows the entries through the model. The whole layer is packed when its first tensor is asked for."""

    def __init__(self, stream: LayerStream, layout: Layout, ids: mx.array):
        self._stream, self._packings, self._ids = stream, layout.packings, ids
        self._layer = -1
        self._hidden = mx.array(0.0)  # the text's activations before the next layer
        self._made: dict[str, list[mx.array]] = {}  # of this layer, not yet asked for

    def __call__(self, entry: Entry) -> list[mx.array]:
        layer = layer_of(entry.name)
        if layer is not None and layer != self._layer:
            self._layer = layer
            self._pack_layer(layer)
        parts = self._made.pop(entry.name) if entry.name in self._made else self._outside_layers(entry)
        if entry.path == EMBEDDING:
            self._hidden = self._stream.embedded(dequantized_matrix(parts, entry.packing)[self._ids])
        return parts

    def _outside_layers(self, entry: Entry) -> list[mx.array]:
        """The arrays of the embedding, of the head, or of a tensor that is not packed."""
        weight = self._stream.source.read(entry.name)
        if entry.packing is None:
            return [weight]
        if entry.path == EMBEDDING:
            hessian = _hessian_of_embedding(self._stream, self._ids)
        else:
            hessian = _hessian_of_head(self._stream, self._hidden)
        return gptq(weight, hessian, entry.packing, to_mlx(entry.tensor.dtype))

    def _pack_layer(self, i: int) -> None:
        """Packs the linear layers of layer `i`, and takes the activations through it."""
        stream, layer = self._stream, self._stream.layer(i)
        self._made = {}
        for path in stream.linears:
            name = f"model.layers.{i}.{path}.weight"
            if name not in self._packings:
                continue
            packing, dtype = self._packings[name], to_mlx(stream.source.tensors[name].dtype)
            weight = linear(layer, path).weight
            hessians = hessians_of(stream.inputs(layer, path, self._hidden))
            if weight.ndim == 2:
                made = gptq(weight, hessians[0], packing, dtype)
            else:
                # An expert that the text never reaches has a Hessian of zeros, which leaves grids of least error.
                pieces = [gptq(weight[i], hessian, packing, dtype) for i, hessian in enumerate(hessians)]
                made = [mx.stack(list(kind)) for kind in zip(*pieces, strict=True)]
            linear(layer, path).weight = dequantized_matrix(made, packing)
            self._made[name] = made
            mx.eval(layer.parameters())
            mx.clear_cache()
        self._hidden = stream.run(layer, self._hidden)


def hessian_of(inputs: Iterable[mx.array]) -> mx.array:
    """The sum of x x^T over inputs (tokens, width), float32 (width, width)."""
    return hessians_of([part] for part in inputs)[0]


def hessians_of(inputs: Iterable[Sequence[mx.array]]) -> list[mx.array]:
    """`hessian_of` for each of several matrices: every item of `inputs` has one array for each of them."""
    totals: list[mx.array] = []
    for parts in inputs:
        floats = [part.astype(mx.float32) for part in parts]
        products = [part.T @ part for part in floats]
        totals = [total + new for total, new in zip(totals, products, strict=True)] if totals else products
        mx.eval(totals)
    return totals


def _hessian_of_head(stream: LayerStream, hidden: mx.array) -> mx.array:
    return hessian_of([stream.norm(hidden).flatten(0, -2)])


def _hessian_of_embedding(stream: LayerStream, ids: mx.array) -> mx.array:
    """Rows that are looked up weigh alike. A tied embedding also makes logits, and each task has half the weight."""
    same = mx.eye(stream.config.hidden_size)
    if not stream.config.tie_word_embeddings:
        return same
    hidden = stream.embed(ids)
    for i in range(stream.config.num_hidden_layers):
        hidden = stream.run(stream.layer(i), hidden)
        mx.clear_cache()
    hessian = _hessian_of_head(stream, hidden)
    return hessian + mx.diag(hessian).mean() * same


def gptq(weight: mx.array, hessian: mx.array, packing: Mapping[str, Any], dtype: mx.Dtype) -> list[mx.array]:
    """A weight (outputs, inputs) packed for inputs of that `hessian`: weight, scales and biases, these in `dtype`.

    CheckpointError where one of the two is not finite.
    """
    if not is_finite(weight) or not is_finite(hessian):
        raise CheckpointError("the model's weights or activations are not finite, which GPTQ needs; use method='round'")
    factor = _inverse_factor(hessian)
    group_size, bits = packing["group_size"], packing["bits"]
    pieces = []
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        columns = weight[first : first + _ROWS_AT_ONCE].astype(mx.float32).T
        codes, scales, biases = _round(columns, factor, group_size, bits, dtype)
        pieces.append((mx.array(pack_codes(np.array(codes.T), bits)), scales.T, biases.T))
        mx.eval(pieces[-1])
    return [mx.contiguous(mx.concatenate(list(kind))) for kind in zip(*pieces, strict=True)]


def _inverse_factor(hessian: mx.array) -> mx.array:
    """The upper triangular U with U^T U = (H + damping)^-1."""
    diagonal = mx.diag(hessian)
    mean = mx.maximum(diagonal.mean(), 1e-20)
    damping = _DAMPING
    while True:
        # Read from its end, H = V V^T with an upper triangular V, whose inverse is U: no inverse of H is needed.
        backwards = (hessian + mx.diag(mx.full(diagonal.shape, damping * mean)))[::-1, ::-1]
        lower = mx.linalg.cholesky(mx.contiguous(backwards), stream=mx.cpu)
        if mx.all(mx.diag(lower) > 0).item() and mx.isfinite(lower).all().item():
            break
        damping *= 10  # float32 was too coarse for this one
    return mx.linalg.tri_inv(mx.contiguous(lower[::-1, ::-1]), upper=True, stream=mx.cpu)


def _round(
    rest: mx.array, factor: mx.array, group_size: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes (inputs, outputs), scales and biases (groups, outputs) for a transposed weight (inputs, outputs)."""
    codes, scales, biases = [], [], []
    for first in range(0, len(factor), group_size):
        last = first + group_size
        group, rest = rest[:group_size], rest[group_size:]
        group_factor = factor[first:last, first:last]
        # What an error of a column costs in the end is its square over this diagonal's.
        scale, bias = _grid(group, 1 / mx.diag(group_factor)[:, None] ** 2, bits, dtype)
        errors = []
        for k in range(group_size):
            column, group = group[0], group[1:]
            code = mx.clip(mx.round((column - bias) / scale), 0, 2**bits - 1)
            error = (column - (code * scale + bias)) / group_factor[k, k]
            group = group - group_factor[k, k + 1 :, None] * error
            codes.append(code.astype(mx.uint8))
            errors.append(error)
        rest = rest - factor[first:last, last:].T @ mx.stack(errors)
        mx.eval(rest, codes[first:])
        scales.append(scale.astype(dtype))
        biases.append(bias.astype(dtype))
    return mx.stack(codes), mx.stack(scales), mx.stack(biases)


def _grid(group: mx.array, importance: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias (outputs), float32 values of `dtype`, that round (inputs, outputs) with the least error."""
    low, high = group.min(axis=0), group.max(axis=0)
    top = 2**bits - 1
    best, scale, bias = mx.full(low.shape, math.inf), mx.ones(low.shape), mx.zeros(low.shape)
    for shrink in _SHRINKS:
        step = ((high - low) * (shrink / top)).astype(dtype).astype(mx.float32)
        step = mx.where(step > 0, step, 1.0)  # a group of one value, which the bias holds
        start = (low * shrink).astype(dtype).astype(mx.float32)
        rounded = mx.clip(mx.round((group - start) / step), 0, top) * step + start
        error = (importance * (group - rounded) ** 2).sum(axis=0)
        better = error < best
        best, scale, bias = mx.where(better, error, best), mx.where(better, step, scale), mx.where(better, start, bias)
    mx.eval(scale, bias)
    return scale, bias


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (rows, width) as MLX packs them: a stream of `bits` each, lowest bit first, in uint32 words."""
    rows = [
        np.packbits(((row[:, None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(-1), bitorder="little")
        for row in codes
    ]
    return np.stack(rows).view(np.uint32)


def dequantized_matrix(parts: Sequence[mx.array], packing: Mapping[str, Any] | None) -> mx.array:
    """The matrix that a packed weight stands for, in float32."""
    if packing is None:
        return parts[0].astype(mx.float32)
    weight, scales, biases = parts
    return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **packing)
