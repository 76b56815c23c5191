"""The shapes of a pass through a model, from which each kernel computes its bytes beside its code."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from .cache import KVBits


@dataclass(frozen=True)
class PassShape:
    """The last `chunk` tokens of `rows` sequences of `length` tokens, read at once.

    `itemsize`: bytes of a number in computation; `bits`: of the cache, None if it is not packed; `fused_kernel`:
    whether attention is one kernel that keeps its scores in registers, as on a GPU.
    """

    config: Config
    chunk: int
    length: int
    rows: int = 1
    bits: KVBits | None = None
    itemsize: int = 2
    fused_kernel: bool = True

    @property
    def queries(self) -> int:
        """Tokens of a row that are read."""
        return min(self.chunk, self.length)

    @property
    def tokens(self) -> int:
        """Tokens of all rows that are read."""
        return self.rows * self.queries

    @property
    def keys(self) -> int:
        """Keys of a row that some of its queries see."""
        window = self.config.sliding_window
        return self.length if window is None else min(self.length, self.chunk + window)

    def is_masked(self, keys: int) -> bool:
        """Whether the mask of this many keys is an array: where a window hides some."""
        window = self.config.sliding_window
        return window is not None and keys > window
