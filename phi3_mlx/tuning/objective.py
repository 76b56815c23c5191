"""What a run makes smaller: how lines of data are encoded for it, and the loss of a part of a batch.

The trainer knows batches, gradients and checkpoints, and asks its objective for all else. `SFT` (supervised
fine-tuning) is the usual one; those that learn from preferences are in `preferences.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx

from .batches import Part, make_part
from .examples import Encoded, Example, encode_records
from .loss import part_loss
from .rows import Record, read_row

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer
    from .settings import Settings

Scored = Callable[[Sequence[Example]], list[float]]  # sums of log p of the trained tokens, under the model as it is


class Objective:
    """What every objective has. One is made for a run, of its settings.

    `figures` names what it measures beside the loss. `reads_reference`: it compares with the model as it was before the
    first step.
    """

    figures: ClassVar[tuple[str, ...]] = ()
    reads_reference: ClassVar[bool] = False

    def read(self, value: Any, source: str, unused: dict[str, str]) -> Any:
        """The record that a line's value is; see `rows.read_row`."""
        raise NotImplementedError

    def encode(self, records: Iterable[Any], tokenizer: Tokenizer, settings: Settings) -> Encoded:
        """Token ids and masks of the records."""
        raise NotImplementedError

    def count(self, batch: Sequence[Any]) -> int:
        """What the sum of the losses of a batch's examples is divided by."""
        return len(batch)

    def shared(self, batch: Sequence[Any], references: Sequence[Sequence[float]], score: Scored) -> float:
        """A number that the losses of a batch's examples share, taken before any of them."""
        return 0.0

    def part(self, examples: Sequence[Any], references: Sequence[Sequence[float]], shared: float) -> Part:
        """Some examples of a batch as the model reads them; `references`: see `scored`."""
        raise NotImplementedError

    def loss(
        self, model: Model, part: Any, *, checkpoint: bool = False, keys: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The sum of the losses of a part, float32, and (2, figures): sums of the figures, and of how many.

        `checkpoint` and `keys`: see `Decoder.end_to_end`.
        """
        raise NotImplementedError


class SFT(Objective):
    """Next-token prediction on the trained tokens: the mean of -log p over those of a batch."""

    def read(self, value: Any, source: str, unused: dict[str, str]) -> Record:
        return read_row(value, source, unused)

    def encode(self, records: Iterable[Record], tokenizer: Tokenizer, settings: Settings) -> Encoded:
        return encode_records(
            records,
            tokenizer,
            max_length=settings.max_length,  # type: ignore[arg-type]
            overflow=settings.overflow,  # type: ignore[arg-type]
            train_on=settings.train_on,  # type: ignore[arg-type]
        )

    def count(self, batch: Sequence[Example]) -> int:
        return sum(int(example.trained.sum()) for example in batch)

    def part(self, examples: Sequence[Example], references: Sequence[Sequence[float]], shared: float) -> Part:
        return make_part(examples)

    def loss(
        self, model: Model, part: Part, *, checkpoint: bool = False, keys: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        return part_loss(model, part, checkpoint=checkpoint, keys=keys), mx.zeros((2, 0))
