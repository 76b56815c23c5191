"""Packing a tensor by rounding each weight to the nearest value there is."""

from __future__ import annotations

import os
from functools import cache, partial

import mlx.core as mx

from .layout import Entry, Rounder, Scheme
from .sources import Source

# Numbers quantized at once in modes other than affine, where MLX's CPU backend makes copies of them in float32.
_QUANTIZED_AT_ONCE = 1 << 18
# How many copies, as `fuse` was measured for tests/test_tuning_memory.py; in the affine mode of the whole matrix.
_COPIES = {"affine": 0.5, "mxfp4": 18.0, "mxfp8": 2.0, "nvfp4": 21.0}


def rounded(source: Source) -> Rounder:
    """The rounder that takes the nearest values, and blocks that the source has in an entry's packing as they are."""
    return partial(_rounded, source)


def _rounded(source: Source, entry: Entry) -> list[mx.array]:
    if entry.packing is None:
        return [source.read(entry.name)]
    blocks = source.blocks.get(entry.name)
    if blocks is not None and blocks.packing == entry.packing:
        return blocks.read()
    return pack(source.read(entry.name), entry.packing)


def pack(weight: mx.array, packing: Scheme) -> list[mx.array]:
    """A matrix, or an array of them, packed: weight, scales and, in the affine mode, biases; evaluated."""
    streams = _streams() if _on_cpu() else [mx.default_stream(mx.default_device())]
    rows = -(-len(weight) // len(streams))
    if _on_cpu() and packing["mode"] != "affine":
        rows = min(rows, max(1, len(weight) * _QUANTIZED_AT_ONCE // (weight.size * len(streams))))
    pieces = []
    for i, first in enumerate(range(0, len(weight), rows)):
        pieces.append(mx.quantize(weight[first : first + rows], **packing, stream=streams[i % len(streams)]))
        if i % len(streams) == len(streams) - 1:
            mx.eval(pieces)
    mx.eval(pieces)
    del weight
    if len(pieces) == 1:
        return list(pieces[0])
    parts = [mx.concatenate(list(kind)) for kind in zip(*pieces, strict=True)]
    mx.eval(parts)
    return parts


def quantizing_bytes(numbers: int, packing: Scheme) -> int:
    """Bytes that `pack` takes beside a matrix of `numbers` numbers and its result."""
    in_slices = _on_cpu() and packing["mode"] != "affine"
    copies = _COPIES[packing["mode"] if in_slices else "affine"]
    return int(4 * copies * (min(numbers, _QUANTIZED_AT_ONCE) if in_slices else numbers))


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


@cache
def _streams() -> list[mx.Stream]:
    """One for each core: on the CPU a stream is a thread, and quantizing uses no more than its own."""
    return [mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, 8))]
