"""Which rows each step reads, where sources have shares that may change from one phase to the next.

The step's number and the seed say it all, so that a run can go on from any step, and every beginning of a phase has the
phase's shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 14  # rows that are drawn at once
# The fractional parts of its multiples fill the unit interval as evenly as those of any number: a source with a share
# of it is drawn at even distances, and no two sources in step.
_GOLDEN = (5**0.5 - 1) / 2


class Phase(NamedTuple):
    """From which step on each source has which share of the tokens."""

    first: int
    shares: tuple[float, ...]


class MixedBatches:
    """The batches of a run over several sources. `rows` and `tokens`: how many each source has.

    A source's rows come in an order drawn anew each time that all were read; a phase goes on where the one before it
    ended.
    """

    def __init__(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        phases: Sequence[Phase],
        *,
        batch_size: int,
        steps: int,
        seed: int,
    ):
        self._rows, self._batch_size, self._seed, self.phases = rows, batch_size, seed, phases
        self._offsets = np.cumsum([0, *rows])
        self.steps, self.steps_per_epoch = steps, max(1, -(-sum(rows) // batch_size))
        means = np.array(tokens) / np.maximum(1, rows)
        self._firsts = [phase.first * batch_size for phase in phases]
        self._bounds = [row_shares(phase.shares, means).cumsum() for phase in phases]
        self._taken = [np.zeros(len(rows), np.int64)]  # of each source, before each block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, step: int) -> list[int]:
        """Indexes of the rows of a step, counted from 0."""
        first = step * self._batch_size
        return [self._row(n) for n in range(first, first + self._batch_size)]

    def read(self) -> set[int]:
        """Indexes of all rows that the run reads."""
        return {row for step in range(self.steps) for row in self.batch(step)}

    def counts(self, first: int, end: int) -> np.ndarray:
        """How many rows of each source the steps from `first` on read, before step `end`; int64 (sources,)."""
        rows = np.zeros(len(self._rows), np.int64)
        n, last = first * self._batch_size, end * self._batch_size
        while n < last:
            block, place = divmod(n, _BLOCK)
            some = self._sources(block)[place : place + last - n]
            rows += np.bincount(some, minlength=len(rows))
            n += len(some)
        return rows

    def _row(self, n: int) -> int:
        """The index of the row that is drawn as number `n` of the run."""
        block, place = divmod(n, _BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._drawn(block))
        source, count = int(self._block[1][place]), int(self._block[2][place])
        reading, place = divmod(count, self._rows[source])
        return int(self._offsets[source] + self._order(source, reading)[place])

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a block its source, and how many of that source were drawn before it."""
        while len(self._taken) <= block:
            sources = self._sources(len(self._taken) - 1)
            self._taken.append(self._taken[-1] + np.bincount(sources, minlength=len(self._rows)))
        sources = self._sources(block)
        counts = np.empty(_BLOCK, np.int64)
        for source, before in enumerate(self._taken[block]):
            places = np.flatnonzero(sources == source)
            counts[places] = before + np.arange(len(places))
        return sources, counts

    def _sources(self, block: int) -> np.ndarray:
        n = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
        phases = np.searchsorted(self._firsts, n, side="right") - 1
        spots = ((n + 0.5) * _GOLDEN) % 1.0
        sources = np.empty(_BLOCK, np.int64)
        for phase in np.unique(phases):
            mine = phases == phase
            bounds = self._bounds[phase]
            sources[mine] = np.searchsorted(bounds[:-1], spots[mine], side="right")
        return sources

    def _order(self, source: int, reading: int) -> np.ndarray:
        if (source, reading) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key in ((source, reading - 1),)
                            or key[0] != source}  # fmt: skip
            rng = np.random.default_rng([self._seed, source, reading])
            self._orders[source, reading] = rng.permutation(self._rows[source])
        return self._orders[source, reading]


def row_shares(shares: Sequence[float], means: np.ndarray) -> np.ndarray:
    """Shares of the rows, of sources whose rows have `means` tokens, from shares of the tokens."""
    of_rows = np.array(shares) / np.maximum(means, 1e-9)
    result: np.ndarray = of_rows / of_rows.sum()
    return result


def tokens_a_row(shares: Sequence[float], rows: Sequence[int], tokens: Sequence[int]) -> float:
    """The mean tokens of a row of the mix."""
    means = np.array(tokens) / np.maximum(1, rows)
    return float(row_shares(shares, means) @ means)
