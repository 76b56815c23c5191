"""Pretraining's objective: the next token of every document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tuning.batches import Part, make_part
from ..tuning.objective import SFT


class NextToken(SFT):
    """The mean of -log p over all tokens of a batch's rows, each document for itself."""

    def count(self, batch: Sequence[Any]) -> int:
        return sum(len(sequence) - 1 for row in batch for sequence in row.sequences)

    def part(self, examples: Sequence[Any], references: Sequence[Sequence[float]], shared: float) -> Part:
        return make_part([sequence for row in examples for sequence in row.sequences])
