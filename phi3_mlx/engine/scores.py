"""Log-probabilities of given tokens, from hidden states, some positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..models.normalizer import log_normalizer
from .alternatives import Alternatives, Likeliest

if TYPE_CHECKING:
    from ..models.decoder import Model

_LOGITS_AT_ONCE = 1 << 22  # numbers, 16 MB in float32
_PARTS = 8  # of a slice whose alternatives are sought one after the other
_POSITIONS = 64  # at least, since a packed output layer may be dequantized for every slice


class TokenScore(NamedTuple):
    """The natural log-probability of a token, whether it was the likeliest in its place, and which were there."""

    logprob: float
    is_likeliest: bool
    top: Alternatives = ()


def positions_at_once(vocab_size: int) -> int:
    """How many positions have logits at the same time."""
    return max(_POSITIONS, _LOGITS_AT_ONCE // vocab_size)


class Scores:
    """The scores of tokens that may follow some positions; they are on their way when it is made.

    hidden (tokens, hidden_size) of a pass, of which these `places` are scored, for each the ids of the tokens, perhaps
    several, and in `top` how many of the likeliest are wanted.
    """

    def __init__(
        self,
        model: Model,
        hidden: mx.array,
        targets: Sequence[Sequence[int]],
        top: Sequence[int] = (),
        *,
        places: list[int],
    ):
        self._targets = targets
        # Of each slice of positions: log-probabilities and whether likeliest (tokens,), and the likeliest.
        self._slices: list[tuple[mx.array, mx.array, list[Likeliest]]] = []
        step = positions_at_once(model.config.vocab_size)
        for first in range(0, len(targets), step):
            mx.eval(self.arrays)  # or MLX would hold the logits of the slice before and of this
            here = places[first : first + step]
            logits = model.logits(hidden[mx.array(here)], here).astype(mx.float32)
            self._slices.append(_scores(logits, targets[first : first + step], top[first : first + step]))
        mx.async_eval(self.arrays)  # another thread could not, and may take the next step

    @property
    def arrays(self) -> list[mx.array]:
        """All that is computed."""
        alternatives = [array for *_, parts in self._slices for part in parts for array in part.arrays]
        return [array for logprobs, likeliest, _ in self._slices for array in (logprobs, likeliest)] + alternatives

    def told(self) -> list[TokenScore]:
        """Of all tokens, position after position."""
        numbers: list[tuple[Any, Any]] = []
        for logprobs, likeliest, _ in self._slices:
            numbers += zip(logprobs.tolist(), likeliest.tolist(), strict=True)  # type: ignore[arg-type]
        tops = [top for *_, parts in self._slices for part in parts for top in part.told()]
        of_positions = zip(self._targets, tops or [()] * len(self._targets), strict=True)
        of_tokens = [top for ids, top in of_positions for _ in ids]
        return [TokenScore(*pair, top) for pair, top in zip(numbers, of_tokens, strict=True)]


def _scores(
    logits: mx.array, targets: Sequence[Sequence[int]], top: Sequence[int]
) -> tuple[mx.array, mx.array, list[Likeliest]]:
    """logits (P, vocab_size) in float32 -> of the targets what `Scores` keeps of a slice."""
    places = mx.array([place for place, ids in enumerate(targets) for _ in ids])
    ids = mx.array([token for ids in targets for token in ids])
    normalizers = log_normalizer(logits)
    logprobs = logits[places, ids] - normalizers[places]
    alternatives = []
    step = max(1, len(targets) // _PARTS)  # each part sorts numbers beside the logits
    for first in range(0, len(top), step):
        part = slice(first, first + step)
        alternatives.append(Likeliest(logits[part], normalizers[part], top[part]))
        mx.eval(alternatives[-1].arrays)
    return logprobs, ids == mx.argmax(logits, axis=-1)[places], alternatives
