"""Packing a tensor by rounding each weight to the nearest value there is."""

from __future__ import annotations

import os
from functools import cache, partial

import mlx.core as mx

from .layout import Entry, Rounder, Scheme
from .sources import Source


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
    streams = _streams() if mx.default_device().type == mx.DeviceType.cpu else [mx.default_stream(mx.default_device())]
    rows = -(-len(weight) // len(streams))
    pieces = [
        mx.quantize(weight[first : first + rows], **packing, stream=streams[i])
        for i, first in enumerate(range(0, len(weight), rows))
    ]
    mx.eval(pieces)
    del weight
    if len(pieces) == 1:
        return list(pieces[0])
    parts = [mx.concatenate(list(kind)) for kind in zip(*pieces, strict=True)]
    mx.eval(parts)
    return parts


@cache
def _streams() -> list[mx.Stream]:
    """One for each core: on the CPU a stream is a thread, and quantizing uses no more than its own."""
    return [mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, 8))]
