"""Texts that say nearly the same as one of many others.

MinHash signatures (datasketch) in bands say which may be near; what two texts really share decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import IO

import numpy as np

from ..errors import OptionError
from .shingles import jaccard, run_hashes, shingle_set

_PERMUTATIONS = 128
_MISSED = 0.002  # of pairs that are as alike as the threshold: no band of their signatures is equal
_NONE = -1
_HASHED_AT_ONCE = 8192  # shingles whose permutations are in memory, 1 KB each


class NearTexts:
    """Texts that were added, found by what they share with another. Their shingles lie in `file`.

    Two texts are near if their sets of `ngram` words in a row have a Jaccard similarity of `threshold` or more.
    `instead` ends the message of the OptionError where datasketch is not installed.
    """

    def __init__(self, threshold: float, ngram: int, file: IO[bytes], instead: str):
        try:
            import datasketch
        except ImportError as error:
            raise OptionError(
                f'near duplicates need the package datasketch: pip install "phi3-mlx[data]"{instead}'
            ) from error
        self._threshold, self._ngram = threshold, ngram
        self._bands, self._rows = bands(threshold)
        self._table = BandTable(self._bands)
        self._empty = datasketch.MinHash(_PERMUTATIONS, hashfunc=int)  # its permutations are those of all
        self._file = file
        self._sources: list[str] = []
        self._ends = array("q", [0])

    def find(self, text: str) -> tuple[str, float] | None:
        """The source of a text that is near, and how near; None if there is none."""
        return self._seek(text, None)

    def find_or_add(self, text: str, source: str) -> tuple[str, float] | None:
        """As `find`; a text that is near none is added."""
        return self._seek(text, source)

    def _seek(self, text: str, added_as: str | None) -> tuple[str, float] | None:
        hashes = shingle_set(text, self._ngram)
        signature = self._empty.copy()
        for first in range(0, len(hashes), _HASHED_AT_ONCE):  # datasketch takes 32 bits
            signature.update_batch((hashes[first : first + _HASHED_AT_ONCE] >> np.uint64(32)).tolist())
        keys = run_hashes(signature.hashvalues[: self._bands * self._rows], self._rows)[:: self._rows].tolist()
        for place in self._table.find(keys):
            if (share := jaccard(hashes, self._shingles(place))) >= self._threshold:
                return self._sources[place], share
        if added_as is not None:
            self._table.add(keys)
            self._sources.append(added_as)
            self._file.seek(self._ends[-1])
            self._file.write(hashes.tobytes())
            self._ends.append(self._ends[-1] + hashes.nbytes)
        return None

    def _shingles(self, place: int) -> np.ndarray:
        self._file.seek(self._ends[place])
        return np.frombuffer(self._file.read(self._ends[place + 1] - self._ends[place]), np.uint64)


class BandTable:
    """Which of the texts that were added, 0, 1, 2 ..., have one of some keys; a text has `bands` keys of 64 bits.

    A hash table with chains, in arrays: 20 to 32 bytes a key, where a dictionary of lists has 300. The keys' lowest
    bits are taken for random.
    """

    def __init__(self, bands: int):
        self._bands = bands
        self._keys = array("Q")
        self._before = array("q")  # the entry before, of those whose keys are in the same slot
        self._last = array("q", [_NONE])  # of each slot; there are 2**n, no fewer than keys

    def find(self, keys: Sequence[int]) -> list[int]:
        """The texts that have one of the keys, in the order that they were added."""
        places = set()
        last, before, known, mask = self._last, self._before, self._keys, len(self._last) - 1
        for key in keys:
            entry = last[key & mask]
            while entry != _NONE:
                if known[entry] == key:
                    places.add(entry // self._bands)
                entry = before[entry]
        return sorted(places)

    def add(self, keys: Sequence[int]) -> None:
        """Add the next text, with its keys."""
        if len(self._keys) + len(keys) > len(self._last):
            self._grow(len(self._keys) + len(keys))
        mask = len(self._last) - 1
        for key in keys:
            self._before.append(self._last[key & mask])
            self._last[key & mask] = len(self._keys)
            self._keys.append(key)

    def _grow(self, count: int) -> None:
        """Deal the entries out to more slots, at least one for each of `count` keys."""
        slots = 1 << (count - 1).bit_length()
        of_entry = np.frombuffer(self._keys, np.uint64) & np.uint64(slots - 1)
        entries = np.argsort(of_entry, kind="stable")
        of_entry = of_entry[entries]
        follows = of_entry[1:] == of_entry[:-1]
        before, last = np.frombuffer(self._before, np.int64), np.full(slots, _NONE)
        before[:] = _NONE
        before[entries[1:][follows]] = entries[:-1][follows]
        last[of_entry] = entries  # of the same slot the last one stays
        self._last = array("q", last.tobytes())


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many hashes: the longest bands that miss few pairs of this similarity."""
    for rows in range(_PERMUTATIONS // 2, 0, -1):
        count = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= _MISSED:
            return count, rows
    return _PERMUTATIONS, 1
