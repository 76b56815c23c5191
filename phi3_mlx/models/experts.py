"""Linear layers of which every row of a batch has its own: the experts of a mixture, their matrices stacked.

Rows come sorted by expert (`Groups`), so that each matrix meets all its rows at once. MLX's gathered products do that
on a GPU. Its CPU backend computes them row by row, so there many rows are multiplied expert by expert.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .linear import one_of, unpacked_product, unpacking_pays

_MANY = 64  # rows from which on sorting them, and on the CPU going expert by expert, costs less than it saves


class Groups:
    """Which of `count` experts each token goes to, `experts` (N, k), as rows: a token once for each of its experts."""

    def __init__(self, experts: mx.array, count: int):
        experts = mx.stop_gradient(experts)
        self._count, self._each = count, experts.shape[1]
        self.is_sorted = experts.size >= _MANY
        self.experts = experts.flatten()  # (N * k,), of each row
        if self.is_sorted:
            self._order = mx.argsort(self.experts)
            self.experts = self.experts[self._order]

    def rows(self, tokens: mx.array) -> mx.array:
        """(N, width) -> (N * k, width)."""
        if self.is_sorted:
            return tokens[self._order // self._each]
        return mx.repeat(tokens, self._each, axis=0)

    def ordered(self, numbers: mx.array) -> mx.array:
        """Numbers (N, k) that belong to tokens and experts -> (N * k,), in the order of the rows."""
        return numbers.flatten()[self._order] if self.is_sorted else numbers.flatten()

    def summed(self, rows: mx.array) -> mx.array:
        """(N * k, width) -> (N, width): the rows of a token added up."""
        if self.is_sorted:
            rows = rows[mx.argsort(self._order)]
        return rows.reshape(-1, self._each, rows.shape[-1]).sum(axis=1)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rows of each expert, (first, past the last), where they are sorted; waits for their computation."""
        counts = np.bincount(np.array(self.experts), minlength=self._count)
        ends = list(accumulate(counts.tolist()))
        return list(zip([0, *ends], ends, strict=False))

    def by_expert(self, rows: mx.array) -> list[mx.array]:
        """Rows (N * k, width) as an array for each expert, some of no rows."""
        if not self.is_sorted:
            rows = rows[mx.argsort(self.experts)]
        return [rows[first:last] for first, last in self.spans]

    @property
    def one_by_one(self) -> bool:
        """Whether experts are multiplied one after the other."""
        return self.is_sorted and mx.default_device().type == mx.DeviceType.cpu


class SwitchLinear(nn.Module):
    """`weight` (experts, outputs, inputs); no bias."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = mx.random.uniform(-bound, bound, (experts, outputs, inputs))

    def __call__(self, rows: mx.array, groups: Groups) -> mx.array:
        """Rows (R, inputs) -> (R, outputs), each by its expert's matrix."""
        if groups.one_by_one:
            matrices = mx.split(self.weight, len(self.weight))
            parts = [
                rows[first:last] @ matrix.squeeze(0).T
                for matrix, (first, last) in zip(matrices, groups.spans, strict=True)
                if last > first
            ]
            return mx.concatenate(parts)
        product = mx.gather_mm(
            rows[:, None], self.weight.swapaxes(-1, -2), rhs_indices=groups.experts, sorted_indices=groups.is_sorted
        )
        return product[:, 0]

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: object
    ) -> QuantizedSwitchLinear:
        return QuantizedSwitchLinear(self.weight, group_size, bits, mode)


class QuantizedSwitchLinear(nn.Module):
    """The same with its matrices packed by `mx.quantize`."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def __call__(self, rows: mx.array, groups: Groups) -> mx.array:
        """Rows (R, inputs) -> (R, outputs), each by its expert's matrix."""
        if groups.one_by_one:
            return mx.concatenate(
                [self._one(e, rows[first:last]) for e, (first, last) in enumerate(groups.spans) if last > first]
            )
        product = mx.gather_qmm(
            rows[:, None],
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=groups.experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=groups.is_sorted,
        )
        return product[:, 0]

    def _one(self, expert: int, rows: mx.array) -> mx.array:
        """Rows (n, inputs) by one expert's matrix, which is unpacked where that is faster."""
        packed = [one_of(self[name], expert) for name in ("weight", "scales", "biases") if name in self]
        how: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        if len(rows) < unpacking_pays():
            return mx.quantized_matmul(rows, *packed, transpose=True, **how)
        product = unpacked_product(lambda: mx.dequantize(*packed, **how))(rows)
        mx.eval(product)  # MLX allocates ahead of what it computes: every expert would be unpacked at once
        return product
