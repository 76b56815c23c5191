"""Which examples a step reads, and how they reach the model: end to end, without padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from .examples import Example

if TYPE_CHECKING:
    from .settings import Settings

Lengths = Sequence[int] | np.ndarray  # of examples
_POOL = 32  # batches that "bucket" sorts by length together: enough to be even, few enough to stay random


class PartSize(NamedTuple):
    """What a part's memory depends on: tokens, attention scores of a head, tokens trained."""

    tokens: int
    scores: int
    trained: int


class CountedExamples(Sequence[Any]):
    """Examples whose sizes are known without reading any: those of a store that is larger than memory."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Of each, the tokens that the model reads (n,)."""

    @property
    @abstractmethod
    def trained(self) -> np.ndarray:
        """Of each, the tokens that are trained (n,)."""


class Batches(Protocol):
    """The batches of a whole run, each known by its step alone."""

    steps: int
    steps_per_epoch: int

    def batch(self, step: int) -> list[int]:
        """Indexes of the examples of a step, counted from 0."""

    def read(self) -> set[int]:
        """Indexes of all examples that the run reads."""


class Schedule:
    """The batches of a run over every example in turn.

    The step's number and the seed give its examples, so nothing else need be stored.

    `order`: "shuffle" shuffles every epoch; "bucket" does too, but puts examples of about one length into a batch.
    Every epoch reads every example once; its last batch may be smaller.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        steps: int | None,
        epochs: float,
        order: str,
        seed: int,
    ):
        self._lengths, self._batch_size, self._order, self._seed = np.array(lengths), batch_size, order, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.steps = steps if steps is not None else max(1, round(epochs * self.steps_per_epoch))
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @classmethod
    def of(cls, lengths: Lengths, settings: Settings) -> Schedule:
        """The batches of a run with these settings over examples of these lengths."""
        return cls(
            lengths,
            settings.batch_size,
            steps=settings.steps,
            epochs=settings.epochs,
            order=settings.order,
            seed=settings.seed,
        )

    def batch(self, step: int) -> list[int]:
        """Indexes of the examples of a step, counted from 0."""
        epoch, n = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][n]

    def read(self) -> set[int]:
        """Indexes of all examples that the run reads."""
        steps = range(min(self.steps, self.steps_per_epoch))  # an epoch reads every example
        return {i for step in steps for i in self.batch(step)}

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        order, size = rng.permutation(len(self._lengths)), self._batch_size
        if self._order == "bucket":
            pools = [order[i : i + _POOL * size] for i in range(0, len(order), _POOL * size)]
            order = np.concatenate([pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools])
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        if self._order == "bucket":
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def largest_part(self, parts: int, trained: Sequence[int], scores: Sequence[int] | None = None) -> PartSize:
        """The most that any part of a batch has of everything; at most three epochs are looked at.

        `trained`: how many tokens of each example are; `scores`: a head's attention scores of each, if it is more than
        one sequence.
        """
        each = [int(n) ** 2 for n in self._lengths] if scores is None else scores
        tokens = most = targets = 0
        for step in range(min(self.steps, 3 * self.steps_per_epoch)):
            for part in split_parts(self.batch(step), self._lengths, parts):
                lengths = [int(self._lengths[i]) for i in part]
                tokens, most = max(tokens, sum(lengths)), max(most, sum(each[i] for i in part))
                targets = max(targets, sum(trained[i] for i in part))
        return PartSize(tokens, most, targets)


def split_parts(batch: Sequence[int], lengths: Lengths, parts: int) -> list[list[int]]:
    """A batch in `parts` parts of about the same number of tokens, of one example each if there are fewer examples."""
    parts = min(parts, len(batch))
    split: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for i in sorted(batch, key=lambda i: -lengths[i]):
        smallest = sizes.index(min(sizes))
        split[smallest].append(i)
        sizes[smallest] += int(lengths[i])
    return split


def within(
    members: Iterable[int], lengths: Mapping[int, int] | Sequence[int] | np.ndarray, limit: int
) -> list[list[int]]:
    """Members in groups of at most `limit` tokens, or of one member."""
    groups: list[list[int]] = []
    size = 0
    for i in members:
        if not groups or size + lengths[i] > limit:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += int(lengths[i])
    return groups


def counts(examples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of each example, the tokens that the model reads (n,) and those that are trained (n,)."""
    if isinstance(examples, CountedExamples):
        return examples.lengths, examples.trained
    trained = [sum(int(sequence.trained.sum()) for sequence in example.sequences) for example in examples]
    return np.array([*map(tokens_read, examples)], np.int64), np.array(trained, np.int64)


def tokens_read(example: Any) -> int:
    """How many tokens of an example the model reads; the last one of a sequence is read by nobody."""
    return sum(len(sequence) - 1 for sequence in example.sequences)


@dataclass(frozen=True)
class Part:
    """Some examples end to end, as the model reads them.

    A sequence's last token is read by nobody, so `ids` (1, L) has one token fewer of each; `places` (N,) in it are
    those from which `targets` (N,), the trained tokens, are predicted.
    """

    ids: mx.array
    lengths: tuple[int, ...]
    places: mx.array
    targets: mx.array

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def make_part(examples: Sequence[Example]) -> Part:
    """Examples of at least two tokens each, ready for `loss.part_loss`."""
    lengths = tuple(len(example) - 1 for example in examples)
    starts = np.cumsum([0, *lengths])
    places = [start + np.flatnonzero(example.trained[1:]) for start, example in zip(starts, examples, strict=False)]
    targets = [example.ids[1:][example.trained[1:]] for example in examples]
    return Part(
        mx.array(np.concatenate([example.ids[:-1] for example in examples]))[None],
        lengths,
        mx.array(np.concatenate(places).astype(np.int32)),
        mx.array(np.concatenate(targets)),
    )
