"""Sequences with caches of their own in one pass: each attends to itself, other layers treat their tokens as one row.

So every weight is read once for all of them, while each sequence keeps the length, the LongRoPE regime, the window and
the packing that it has alone. Sequences that bring one token are rotated and cut from the row together, which spares
Python most of its work in a step of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx

from .attention import make_mask
from .cache import KVCache
from .rope import Regime
from .slots import Unit


@dataclass(frozen=True)
class Addition:
    """What a sequence adds: `length` tokens behind those that its cache has read, in its regime."""

    cache: list[KVCache]
    length: int
    long: bool


@dataclass(frozen=True)
class Alike:
    """Sequences that bring equally many tokens: how they are attended to, and what rotation asks."""

    units: list[Unit]
    length: int
    offset: int | mx.array
    long: Regime

    @property
    def newest(self) -> list[Unit]:
        """The units for the last token of each sequence alone."""
        if self.length == 1:
            return self.units
        return [replace(unit, mask=unit.mask[-1:] if isinstance(unit.mask, mx.array) else None) for unit in self.units]

    @property
    def sequences(self) -> int:
        return sum(len(unit.rows) for unit in self.units)

    def rows(self, row: mx.array) -> mx.array:
        """The block's part of a row of tokens (1, n, width) -> (sequences, length, width)."""
        return row.reshape(self.sequences, self.length, row.shape[-1])


class Together:
    """How a row of tokens is cut into blocks for attention, and joined again.

    `parts` stand in the row in this order; those of one token come first, and are attended to in `units`.
    """

    def __init__(self, parts: Sequence[Addition], units: list[Unit], window: int | None, *, apart: bool = False):
        """`apart`: also those of one token are a block each, of a unit each."""
        singles = [part for part in parts if part.length == 1]
        others = [part for part in parts if part.length > 1]
        if [*singles, *others] != list(parts):
            raise ValueError("parts of one token come first")
        self.blocks: list[Alike] = []
        if apart:
            for part, unit in zip(singles, units, strict=True):
                alone = replace(unit, rows=[0])
                self.blocks.append(Alike([alone], 1, mx.array([part.cache[0].offset]), (part.long,)))
        elif singles:
            offsets = mx.array([part.cache[0].offset for part in singles])
            self.blocks.append(Alike(units, 1, offsets, tuple(part.long for part in singles)))
        for part in others:
            mask = make_mask(part.length, window, part.cache[0])
            unit = Unit([0], part.cache, mask)
            self.blocks.append(Alike([unit], part.length, part.cache[0].offset, part.long))
        ends = accumulate(block.sequences * block.length for block in self.blocks)
        self._cuts = list(ends)[:-1]
        self._last = None if not others else mx.array([end - 1 for end in accumulate(part.length for part in parts)])

    def apart(self, row: mx.array) -> list[mx.array]:
        """(1, tokens, width) -> of each block (sequences, length, width)."""
        pieces = mx.split(row, self._cuts, axis=1) if self._cuts else [row]
        return [block.rows(piece) for block, piece in zip(self.blocks, pieces, strict=True)]

    def newest(self, row: mx.array) -> mx.array:
        """(1, tokens, width) -> of each sequence the last token (1, sequences, width)."""
        return row if self._last is None else row[:, self._last]

    def joined(self, blocks: Sequence[mx.array]) -> mx.array:
        """What `apart` made, in one row again."""
        rows = [block.reshape(1, -1, block.shape[-1]) for block in blocks]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=1)
