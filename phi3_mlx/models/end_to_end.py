"""Sequences of several lengths end to end in one row, for training: no layer spends work on padding.

Only attention mixes tokens. For it the sequences are gathered into blocks of rows padded to one length, and its output
is scattered end to end again. Padding stands after the tokens, where no causal query sees it, and its output is
dropped, so neither numbers nor gradients depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import numpy as np

from .attention import Mask, make_mask

# The longest sequence of a block is at most this many times as long as the shortest, which bounds the padding,
_STRETCH = 1.25
_SLACK = 16  # and this many tokens longer: short sequences would otherwise make many small blocks


class Block:
    """Some of the sequences, as rows padded to one length."""

    def __init__(self, index: np.ndarray, long: tuple[bool, ...], window: int | None):
        self._index = mx.array(index.reshape(-1))  # for each place in the block, the token there
        self._shape = index.shape
        self.long = long
        self.mask: Mask = make_mask(index.shape[1], window)

    def gather(self, row: mx.array) -> mx.array:
        """(1, L, width) -> (B, longest, width)."""
        return row[0][self._index].reshape(*self._shape, row.shape[-1])


class EndToEnd:
    """How a row of sequences end to end is gathered into blocks for attention, and scattered again.

    `lengths`: of the sequences, in their order in the row; `long`: whether the LongRoPE regime of each is the long one.
    """

    def __init__(self, lengths: Sequence[int], long: Sequence[bool], window: int | None):
        starts = [0, *accumulate(lengths)]
        place = np.empty(starts[-1], dtype=np.int32)  # for each token of the row, its place among those of all blocks
        self.blocks: list[Block] = []
        before = 0
        for members in _blocks(lengths):
            longest = lengths[members[0]]
            index = np.empty((len(members), longest), dtype=np.int32)
            for b, n in enumerate(members):
                index[b] = starts[n] + np.minimum(np.arange(longest), lengths[n] - 1)
                place[starts[n] : starts[n + 1]] = before + b * longest + np.arange(lengths[n])
            self.blocks.append(Block(index, tuple(long[n] for n in members), window))
            before += index.size
        self._place = mx.array(place)

    def scatter(self, blocks: Sequence[mx.array]) -> mx.array:
        """One array (B, longest, width) a block, in the shape of `Block.gather`'s -> (1, L, width)."""
        flat = [block.reshape(-1, block.shape[-1]) for block in blocks]
        return (flat[0] if len(flat) == 1 else mx.concatenate(flat))[self._place][None]


def _blocks(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes of the sequences, longest first, in groups of similar length."""
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[groups[-1][0]] <= lengths[n] * _STRETCH + _SLACK:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups
