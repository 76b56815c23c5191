"""Dropout whose draws depend on the token and the layer alone, not on what was drawn before.

Gradient checkpointing computes a layer twice and must drop the same numbers both times. A batch computed in parts, or
by several processes, must drop what the whole batch would. A resumed run must go on with the same draws. So every token
of a training pass has its own random key, and every use of dropout in every layer derives its keys from those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import numpy as np


def token_keys(seed: int, step: int, examples: Sequence[int], lengths: Sequence[int]) -> mx.array:
    """A key for every token of a step: (sum(lengths), 2) uint32.

    `examples` are the places in the data of the step's examples, `lengths` their tokens.
    """
    keys = [
        np.random.SeedSequence([seed, step, example]).generate_state(2 * length)
        for example, length in zip(examples, lengths, strict=True)
    ]
    return mx.array(np.concatenate(keys).reshape(-1, 2))


class Draws:
    """What dropout draws in one pass. `keys` (tokens, 2) uint32; None: drawn once, from MLX's random state."""

    def __init__(self, keys: mx.array | None = None):
        self._keys = keys
        self._layer = self._uses = 0

    @contextmanager
    def within(self, layer: int) -> Iterator[None]:
        """While decoder layer `layer` is computed, `dropped` draws from here, and the same if it is recomputed."""
        self._layer, self._uses = layer, 0
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def kept(self, share: float, tokens: int, width: int) -> mx.array:
        """Which of `width` numbers of every token are kept: (tokens, width) bool, about `share` of them True."""
        if self._keys is None:
            self._keys = mx.random.split(mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32), tokens)
        module_key = np.random.SeedSequence([self._layer, self._uses]).generate_state(2)
        self._uses += 1  # modules of a layer are always computed in the same order
        return mx.vmap(lambda key: mx.random.bernoulli(share, (width,), key=key))(self._keys ^ mx.array(module_key))


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


def dropped(x: mx.array, share: float) -> mx.array:
    """`x` (..., tokens, width) with `share` of its numbers set to 0 and the others scaled by 1 / (1 - share).

    Outside of `Draws.within` they are drawn from MLX's random state.
    """
    draws, keep = _current.get(), 1 - share
    kept = mx.random.bernoulli(keep, x.shape) if draws is None else draws.kept(keep, *x.shape[-2:])
    return mx.where(kept, x / keep, 0.0)
