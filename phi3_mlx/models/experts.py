"""The experts of a mixture: linear layers with stacked matrices, each row of a batch through its own.

Rows come sorted by expert (`Groups`), so that each matrix meets all its rows at once. MLX's gathered products do that
on a GPU. Its CPU backend computes them row by row, so there many rows are multiplied expert by expert, once it is known
how many each has. Training cannot wait for that: all that is computed before the backward pass is built would be kept.
There rows are put into padded blocks of one expert each, whose number does not depend on the router.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .linear import SLICES_ALIVE, dequantized_product, dequantizing_pays, one_of, packing_of, plain_weight

_ROWS_TO_SORT = 64  # rows from which on sorting them, and on the CPU going expert by expert, costs less than it saves
# Arrays of a mixture's rows that are alive at once, each as wide as a token: fitted to the peaks of
# tests/test_phi_moe_tools.py (bench/LOG.md, "One kernel at a time").
_ROW_ARRAYS = 7


class Groups:
    """The rows that the experts multiply: each of N tokens once for each of its k experts.

    `experts` (N, k): which of `count` experts each token goes to.
    """

    def __init__(self, experts: mx.array, count: int, dtype: mx.Dtype = mx.float32):
        """`dtype`: that of the rows, because MLX's CPU backend gathers in float32 alone."""
        experts = mx.stop_gradient(experts)
        self._count, self._each = count, experts.shape[1]
        self.is_sorted = _sorts(experts.size, dtype)
        self.experts = experts.flatten()  # (N * k,), the expert of each row
        if self.is_sorted:
            self._order = mx.argsort(self.experts)
            self.experts = self.experts[self._order]

    def rows(self, tokens: mx.array) -> mx.array:
        """(N, width) -> (N * k, width)."""
        if self.is_sorted:
            return tokens[self._order // self._each]
        return mx.repeat(tokens, self._each, axis=0)

    def ordered(self, numbers: mx.array) -> mx.array:
        """A number for each token and each of its experts, (N, k) -> (N * k,), in the order of the rows."""
        return numbers.flatten()[self._order] if self.is_sorted else numbers.flatten()

    def by_token(self, rows: mx.array) -> mx.array:
        """(N * k, width) -> (N, k, width): the rows of a token, in the order of its experts."""
        if self.is_sorted:
            rows = rows[mx.argsort(self._order)]
        return rows.reshape(-1, self._each, rows.shape[-1])

    def rows_of(self, tokens: mx.array) -> mx.array:
        """`by_token` back: (N, k, width) -> (N * k, width)."""
        rows = tokens.flatten(0, 1)
        return rows[self._order] if self.is_sorted else rows

    def summed(self, rows: mx.array) -> mx.array:
        """(N * k, width) -> (N, width): the rows of a token added up."""
        return self.by_token(rows).sum(axis=1)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rows of each expert, (first, past the last); sorted rows alone. Waits for the experts to be computed."""
        counts = np.bincount(np.array(self.experts), minlength=self._count)
        ends = list(accumulate(counts.tolist()))
        return list(zip([0, *ends], ends, strict=False))

    def by_expert(self, rows: mx.array) -> list[mx.array]:
        """Rows (N * k, width) as an array for each expert, some of them empty."""
        if not self.is_sorted:
            rows = rows[mx.argsort(self.experts)]
        return [rows[first:last] for first, last in self.spans]

    @property
    def gathers(self) -> bool:
        """Whether MLX's gathered products are the fastest way to multiply the rows."""
        return not self.is_sorted or not _on_cpu()

    @property
    def rows_each(self) -> int:
        """Rows of an expert on average."""
        return len(self.experts) // self._count

    def in_blocks(self, rows: mx.array, product: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
        """`product(blocks (blocks, size, width), expert of each block)` of rows (N * k, width), as rows again."""
        source, places, experts = self._blocks
        result = product(rows[source], experts)
        return result.reshape(-1, result.shape[-1])[places]

    @cached_property
    def _blocks(self) -> tuple[mx.array, mx.array, mx.array]:
        """The row in each place of each block, the place of each row, and the expert of each block."""
        count, total = self._count, len(self.experts)
        size = padded_block(total, count)
        experts = mx.arange(count)
        counts = (self.experts[:, None] == experts).sum(axis=0)
        first_rows = mx.cumsum(counts) - counts
        blocks_each = (counts + size - 1) // size
        ends = mx.cumsum(blocks_each)
        blocks = mx.arange(total // size + count)
        block_experts = mx.minimum((blocks[:, None] >= ends).sum(axis=1), count - 1)
        places = (ends - blocks_each)[self.experts] * size + mx.arange(total) - first_rows[self.experts]
        source = mx.zeros((len(blocks) * size,), mx.int32).at[places].add(mx.arange(total))
        return source.reshape(-1, size), places, block_experts


def _gathered(blocks: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """Blocks (blocks, size, inputs) times the matrix (inputs, outputs) of the expert of each, on the CPU."""
    product = mx.gather_mm(blocks.astype(mx.float32), weight.astype(mx.float32), rhs_indices=experts)
    return product.astype(blocks.dtype)


def _sorts(rows: int, dtype: mx.Dtype) -> bool:
    return rows >= _ROWS_TO_SORT or (_on_cpu() and dtype != mx.float32)


def waits_for_groups(rows: int, dtype: mx.Dtype) -> bool:
    """Whether products of this many rows wait for the experts to be known, see `Groups.gathers`."""
    return _on_cpu() and _sorts(rows, dtype)


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def padded_block(rows: int, experts: int) -> int:
    """Rows of a block in training on the CPU: larger blocks are faster and have more padding."""
    return 64 if rows >= 64 * experts else 32


class SwitchLinear(nn.Module):
    """A linear layer an expert: `weight` (experts, outputs, inputs), no bias."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = mx.random.uniform(-bound, bound, (experts, outputs, inputs))

    def __call__(self, rows: mx.array, groups: Groups) -> mx.array:
        """Rows (R, inputs) -> (R, outputs), each by its expert's matrix."""
        if groups.gathers:
            product = mx.gather_mm(
                rows[:, None], self.weight.swapaxes(-1, -2), rhs_indices=groups.experts, sorted_indices=groups.is_sorted
            )
            return product[:, 0]
        if self.training:
            return groups.in_blocks(
                rows, lambda blocks, experts: _gathered(blocks, self.weight.swapaxes(-1, -2), experts)
            )
        spans = enumerate(groups.spans)
        return mx.concatenate(
            [rows[first:last] @ one_of(self.weight, e).T for e, (first, last) in spans if last > first]
        )

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: object
    ) -> QuantizedSwitchLinear:
        packed = QuantizedSwitchLinear(self.weight, group_size, bits, mode)
        packed.train(self.training)
        return packed


class QuantizedSwitchLinear(nn.Module):
    """A `SwitchLinear` whose matrices are packed by `mx.quantize`."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def __call__(self, rows: mx.array, groups: Groups) -> mx.array:
        """Rows (R, inputs) -> (R, outputs), each by its expert's matrix."""
        if groups.gathers or (self.training and groups.rows_each < self._dequantizing_pays(rows)):
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
        if self.training:
            return groups.in_blocks(rows, self._dequantized_blocks)
        return mx.concatenate(
            [self._one_expert(e, rows[first:last]) for e, (first, last) in enumerate(groups.spans) if last > first]
        )

    def _dequantizing_pays(self, rows: mx.array) -> int:
        """From how many rows of an expert on its matrix is better dequantized for rows like these (R, inputs)."""
        return dequantizing_pays(rows.dtype.size, self.scales.shape[1] * rows.shape[1])

    def _dequantized_blocks(self, blocks: mx.array, experts: mx.array) -> mx.array:
        """`_gathered` with all matrices dequantized for the product alone, forward and backward."""

        @mx.custom_function
        def product(blocks: mx.array) -> mx.array:
            weight = plain_weight(self).astype(blocks.dtype)
            return _gathered(blocks, weight.swapaxes(-1, -2), experts)

        @product.vjp
        def product_vjp(blocks: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return _gathered(cotangent, plain_weight(self).astype(blocks.dtype), experts)

        return product(blocks)  # type: ignore[return-value]

    def _one_expert(self, expert: int, rows: mx.array) -> mx.array:
        """Rows (n, inputs) by one expert's matrix, which is dequantized where that is faster."""
        weight, scales = one_of(self.weight, expert), one_of(self.scales, expert)
        biases = one_of(self.biases, expert) if "biases" in self else None
        if len(rows) < self._dequantizing_pays(rows):
            return mx.quantized_matmul(rows, weight, scales, biases, transpose=True, **packing_of(self))
        product = dequantized_product(weight, scales, biases, **packing_of(self))(rows)
        mx.eval(product)  # MLX allocates ahead of what it computes: every expert would be dequantized at once
        return product


def rows_bytes(tokens: int, experts_per_token: int, width: int, itemsize: int) -> int:
    """Bytes of `Groups.rows` of this many tokens, their products and their sums: rows (tokens * experts, width)."""
    return _ROW_ARRAYS * tokens * experts_per_token * width * itemsize


def expert_bytes(numbers: int, dequantizing: int, itemsize: int) -> int:
    """Bytes that dequantizing an expert's matrix of `numbers` takes, `dequantizing` bytes for each.

    One expert at a time is dequantized, where the one before it was, or slices of it.
    """
    return min(numbers * (dequantizing - itemsize), SLICES_ALIVE * dequantizing)
