"""A rounded matrix made better in place: integers one by one, scales and biases in closed form, group by group.

What is lost is tr((W - Q) H (W - Q)^T): it is quadratic, so the best value of one integer, with all others as they are,
is known, and so are the best scale and bias of a row's group with its integers as they are (least squares of two
unknowns). Each is taken as it is stored, and only where that loses less, so no step makes a matrix worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

_IN_TURN = 16  # codes that move each other one by one


@dataclass
class Rounded:
    """A transposed matrix in groups of inputs: `codes` (inputs, outputs) uint8, `scales` and `biases` (groups, outputs)
    float32, with values that `dtype` holds."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    dtype: mx.Dtype

    @property
    def group_size(self) -> int:
        return len(self.codes) // len(self.scales)

    @property
    def values(self) -> mx.array:
        """The matrix (inputs, outputs) that this stands for, float32."""
        groups = self.codes.reshape(len(self.scales), self.group_size, -1).astype(mx.float32)
        return (groups * self.scales[:, None] + self.biases[:, None]).reshape(self.codes.shape)


def refitted(columns: mx.array, hessian: mx.array, start: Rounded, sweeps: int) -> Rounded:
    """`start`, which stands for `columns` (inputs, outputs) and inputs of this `hessian`, after some sweeps."""
    size, codes = start.group_size, [*mx.split(start.codes, len(start.scales))]
    scales, biases = [*start.scales], [*start.biases]
    # What one more unit of an input's weight would gain: half the derivative of the loss.
    pull = hessian @ (columns - start.values)
    for _ in range(sweeps):
        for i in range(len(scales)):
            here = slice(i * size, (i + 1) * size)
            block = hessian[here, here]
            before = codes[i].astype(mx.float32)
            code, rest = _best_codes(before, pull[here], block, scales[i], start.bits)
            scale, bias = _best_grid(code, rest, block, scales[i], biases[i], start.dtype)
            change = code * scale + bias - (before * scales[i] + biases[i])
            codes[i], scales[i], biases[i] = code.astype(mx.uint8), scale, bias
            pull = pull - hessian[:, here] @ change
            mx.eval(pull, codes[i], scale, bias)
    return Rounded(mx.concatenate(codes), mx.stack(scales), mx.stack(biases), start.bits, start.dtype)


def in_turn(wanted: mx.array, ties: mx.array, bits: int, before: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Codes (inputs, outputs) for what is `wanted` of them, chosen one input after another, and their steps.

    A code's step is how far it is from the one `before`, or without that from what was wanted of it. Code k's step,
    times `ties[k, j]` of (inputs, inputs), is taken from what is wanted of each later code j.
    """
    codes, steps, top = [], [], mx.array(2.0**bits - 1)
    for first in range(0, len(wanted), _IN_TURN):
        # Steps of these move the ones further on together: a product is faster than as many sums.
        here, wanted = wanted[:_IN_TURN], wanted[_IN_TURN:]
        part = slice(first, first + len(here))
        some, moved = _few_in_turn(here, ties[part, part], top, None if before is None else before[part])
        codes.append(some)
        steps.append(moved)
        if len(wanted):
            wanted = wanted - ties[part, part.stop :].T @ moved
    return mx.concatenate(codes), mx.concatenate(steps)


@mx.compile
def _few_in_turn(wanted: mx.array, ties: mx.array, top: mx.array, before: mx.array | None) -> tuple[mx.array, mx.array]:
    codes, steps = [], []
    for k in range(len(wanted)):
        code = mx.clip(mx.round(wanted[0]), 0, top)
        step = code - (wanted[0] if before is None else before[k])
        wanted = wanted[1:] - ties[k, k + 1 :, None] * step
        codes.append(code)
        steps.append(step)
    return mx.stack(codes), mx.stack(steps)


def _best_codes(
    codes: mx.array, pull: mx.array, block: mx.array, scale: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """The codes of a group, each the best for those before it as they are now, and what is left of its `pull`."""
    diagonal = mx.maximum(mx.diag(block), 1e-30)[:, None]
    ties = (block / diagonal).T  # how a step of one code moves the best of others
    better, steps = in_turn(codes + pull / (diagonal * scale), ties, bits, codes)
    return better, pull - block @ (steps * scale)


def _best_grid(
    codes: mx.array, pull: mx.array, block: mx.array, scale: mx.array, bias: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The scale and bias of each row's group by least squares, as `dtype` holds them, where they lose less."""
    through = block @ codes
    square, cross, plain = (codes * through).sum(axis=0), through.sum(axis=0), block.sum()
    by_scale, by_bias = (codes * pull).sum(axis=0), pull.sum(axis=0)
    determinant = square * plain - cross**2
    safe = mx.where(determinant > 1e-6 * square * plain, determinant, mx.inf)  # else the codes are all alike
    new_scale = (scale + (by_scale * plain - by_bias * cross) / safe).astype(dtype).astype(mx.float32)
    new_bias = (bias + (by_bias * square - by_scale * cross) / safe).astype(dtype).astype(mx.float32)
    d, e = new_scale - scale, new_bias - bias
    gain = 2 * (d * by_scale + e * by_bias) - (d**2 * square + 2 * d * e * cross + e**2 * plain)
    better = (gain > 0) & (new_scale * scale > 0)  # mlx writes scales below 0 too, and they keep their sign
    return mx.where(better, new_scale, scale), mx.where(better, new_bias, bias)
