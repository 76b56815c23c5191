"""Log-probabilities of given tokens, from hidden states, some positions at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

if TYPE_CHECKING:
    from ..models.decoder import Model

_LOGITS_AT_ONCE = 1 << 22  # numbers, 16 MB in float32
_POSITIONS = 64  # at least, since a packed output layer may be dequantized for every slice


class TokenScore(NamedTuple):
    """The natural log-probability of a token, and whether it was the likeliest in its place."""

    logprob: float
    is_likeliest: bool


def positions_at_once(vocab_size: int) -> int:
    """How many positions have logits at the same time."""
    return max(_POSITIONS, _LOGITS_AT_ONCE // vocab_size)


class Scores:
    """The scores of tokens that may follow some positions; they are on their way when it is made.

    hidden (P, hidden_size), and for each position the ids of the tokens, perhaps several.
    """

    def __init__(self, model: Model, hidden: mx.array, targets: Sequence[Sequence[int]]):
        self.arrays: list[mx.array] = []  # log-probabilities and whether likeliest, in turn, a slice after the other
        step = positions_at_once(model.config.vocab_size)
        for first in range(0, len(targets), step):
            if self.arrays:
                mx.eval(self.arrays)  # or MLX would hold the logits of this slice and of the next
            self.arrays += _scores(model.logits(hidden[first : first + step]), targets[first : first + step])
        mx.async_eval(self.arrays)  # another thread could not, and may take the next step

    def told(self) -> list[TokenScore]:
        """Of all tokens, position after position."""
        logprobs: Iterable[list[float]] = (array.tolist() for array in self.arrays[::2])  # type: ignore[misc]
        likeliest: Iterable[list[bool]] = (array.tolist() for array in self.arrays[1::2])  # type: ignore[misc]
        slices = zip(logprobs, likeliest, strict=True)
        return [TokenScore(*score) for both in slices for score in zip(*both, strict=True)]


def _scores(logits: mx.array, targets: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """logits (P, vocab_size) -> log-probabilities of the targets (N,), and whether each is the likeliest (N,)."""
    logits = logits.astype(mx.float32)
    places = mx.array([place for place, ids in enumerate(targets) for _ in ids])
    ids = mx.array([token for ids in targets for token in ids])
    logprobs = logits[places, ids] - mx.logsumexp(logits, axis=-1)[places]
    return logprobs, ids == mx.argmax(logits, axis=-1)[places]
