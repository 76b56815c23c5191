"""What changes logits before a token is drawn: a bias, a constraint, or a caller's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..values import shown


class Processor(Protocol):
    """Changes the logits of one row.

    `reads_answer`: whether it looks at the answer so far. If not, its token is drawn before the one before is known,
    so the device never waits for Python. An exception ends its job alone.
    """

    reads_answer: bool

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        """`answer`: the ids drawn so far. logits (vocab_size,), float32 -> the same, changed; -inf excludes an id."""
        ...


class Bias:
    """Adds a number to the logits of some ids. Called, it raises OptionError for ids outside the vocabulary."""

    reads_answer = False

    def __init__(self, bias: Mapping[int, float]):
        self._least, self._most = min(bias, default=0), max(bias, default=0)
        self._ids = mx.array(list(bias), dtype=mx.int32)
        self._values = mx.array(list(bias.values()), dtype=mx.float32)

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        if self._least < 0 or self._most >= logits.shape[0]:  # MLX would write there all the same
            outside = self._least if self._least < 0 else self._most
            raise OptionError(f"a bias has token id {outside}, outside the vocabulary of {logits.shape[0]}")
        return logits.at[self._ids].add(self._values)


def processed(processors: Sequence[Processor], answer: Sequence[int], logits: mx.array) -> mx.array:
    """logits (vocab_size,), float32, of the token after `answer` -> what the processors make of them, likewise.

    Raises OptionError where one returns something else, and what they raise.
    """
    for processor in processors:
        changed = processor(answer, logits)
        if not isinstance(changed, mx.array) or changed.shape != logits.shape:
            given = f"an array of shape {changed.shape}" if isinstance(changed, mx.array) else shown(changed)
            raise OptionError(f"a processor returned {given}; expected the logits, of shape {logits.shape}")
        logits = changed.astype(mx.float32)
    return logits


class Matcher(Protocol):
    """Knows which ids may follow an answer."""

    def allowed(self, answer: Sequence[int]) -> np.ndarray | None:
        """1 for each id that may come next, else 0 (ids,), uint8; None if no answer can begin like this."""
        ...

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        """The next ids, `most` at most, each of which is the only one that may come in its place."""
        ...


class Constraint:
    """Excludes the ids that a matcher does not allow, and all that it does not know, such as the model's padding."""

    reads_answer = True

    def __init__(self, matcher: Matcher):
        self._matcher = matcher

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        allowed = self._matcher.allowed(answer)
        if allowed is None:  # behind a token that was drafted and will not be accepted
            return logits
        if len(allowed) != len(logits):
            known, allowed = allowed[: len(logits)], np.zeros(len(logits), np.uint8)
            allowed[: len(known)] = known
        return _only(mx.array(allowed), logits)

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        """The next ids, `most` at most, that will be drawn whatever the logits are."""
        return self._matcher.forced(answer, most)


@mx.compile
def _only(allowed: mx.array, logits: mx.array) -> mx.array:
    """The logits where `allowed` is 1, and -inf where it is 0: 1/0 is infinite.

    `mx.where` takes several times as long on a CPU, because it branches at every id.
    """
    return logits - (1 / allowed.astype(mx.float32) - 1)
