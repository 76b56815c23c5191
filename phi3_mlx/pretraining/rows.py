"""Rows of whole documents out of token shards, and the rows of several sources as one sequence of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..tuning.batches import CountedExamples
from ..tuning.examples import Example
from .shards import TokenShards


class DocumentRow(NamedTuple):
    """Some documents; each is read by itself, as attention goes. `source` names them."""

    sequences: tuple[Example, ...]
    source: str


class Rows(CountedExamples):
    """Documents in rows from which the model reads at most `max_length` tokens.

    The documents are put in an order drawn with `seed`, and each row takes as many of the next as it has room for. A
    document that is longer than a row is cut into pieces, which overlap by one token so that each token but the first
    is predicted once. `rows[i]` reads the disk; all else are arrays of 12 bytes a piece.

    `documents` are read, `cut` of them in pieces; `left_out` have one token, of which nothing is predicted.
    """

    def __init__(self, shards: TokenShards, documents: np.ndarray, max_length: int, seed: int, vocab_size: int):
        self._shards, self._max_length, self._vocab_size = shards, max_length, vocab_size
        self.directory = shards.directory
        tokens = shards.lengths[documents].astype(np.int64)
        self.left_out = int((tokens < 2).sum())
        documents, tokens = documents[tokens > 1], tokens[tokens > 1]
        pieces = -(-(tokens - 1) // max_length)
        self.documents, self.cut = len(documents), int((pieces > 1).sum())
        order = np.random.default_rng(seed).permutation(int(pieces.sum()))
        number = np.arange(len(order)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        rest = np.repeat(tokens - 1, pieces) - number * max_length
        self._documents = np.repeat(documents, pieces)[order].astype(np.int32)
        self._numbers = number[order].astype(np.int32)  # of a piece in its document
        self._sizes = np.minimum(rest, max_length)[order].astype(np.int32)  # tokens read
        ends = np.cumsum(self._sizes, dtype=np.int64)
        firsts = [0]
        while firsts[-1] < len(ends):
            first = firsts[-1]
            before = int(ends[first - 1]) if first else 0
            firsts.append(int(np.searchsorted(ends, before + max_length, side="right")))
        self._firsts = np.array(firsts, np.int64)
        starts = self._firsts[:-1]
        self._lengths = np.add.reduceat(self._sizes, starts, dtype=np.int64) if len(ends) else np.zeros(0, np.int64)
        squares = self._sizes.astype(np.int64) ** 2
        self.scores = np.add.reduceat(squares, starts) if len(ends) else np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @property
    def trained(self) -> np.ndarray:
        return self._lengths  # all that are read predict one

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, i: Any) -> Any:
        pieces = range(int(self._firsts[i]), int(self._firsts[i + 1]))
        names = [str(self._documents[piece]) for piece in pieces[:3]]
        named = ", ".join(names) + (", ..." if len(pieces) > 3 else "")
        source = f"{self._shards.directory}: document{'' if len(pieces) == 1 else 's'} {named}"
        return DocumentRow(tuple(self._piece(piece, source) for piece in pieces), source)

    def pieces(self, i: int) -> list[tuple[int, int]]:
        """Of each document in a row its number, and from which of its tokens on it is read."""
        pieces = range(int(self._firsts[i]), int(self._firsts[i + 1]))
        return [(int(self._documents[n]), int(self._numbers[n]) * self._max_length) for n in pieces]

    def _piece(self, piece: int, source: str) -> Example:
        first, size = int(self._numbers[piece]) * self._max_length, int(self._sizes[piece])
        ids = self._shards.read(int(self._documents[piece]), first, size + 1)
        if len(ids) != size + 1 or int(ids.max()) >= self._vocab_size:
            raise DataError(f"{source}: ids that the vocabulary of {self._vocab_size:,} does not have")
        trained = np.ones(size + 1, bool)
        trained[0] = False
        return Example(ids, trained, source)


class Sources(CountedExamples):
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Rows]):
        self.sources = sources
        self._firsts = np.cumsum([0, *map(len, sources)])
        self._lengths = np.concatenate([rows.lengths for rows in sources])
        self.scores = np.concatenate([rows.scores for rows in sources])

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @property
    def trained(self) -> np.ndarray:
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, i: Any) -> Any:
        rows, place = self.find(i)
        return rows[place]

    def find(self, i: int) -> tuple[Rows, int]:
        """The source of a row, and its place there."""
        source = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return self.sources[source], int(i - self._firsts[source])
