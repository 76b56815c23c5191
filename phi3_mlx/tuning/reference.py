"""Log-probabilities of a run's answers under its reference: the model as it is before the first step.

They are computed once, without gradients, and kept beside the checkpoints: so no second copy of the weights is ever in
memory, whatever is trained, and a run that goes on need not read the answers again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, TrainingError
from ..models.decoder import Model
from ..store.atomic import new_file
from ..store.checkpoint import read_arrays
from ..threads import turn
from .batches import make_part, within
from .examples import Example
from .loss import log_probs

if TYPE_CHECKING:
    from .events import Listener

REFERENCE = "reference.safetensors"
_KEPT_EVERY = 60  # seconds between two files of what is known so far
_START_OVER = "start over in another folder with output=DIR"


class Reference:
    """Sums of log p of trained tokens, `train` and `valid` (examples, sequences of one), float32; NaN is unknown."""

    def __init__(
        self,
        model: Model,
        train: Sequence[Any],
        valid: Sequence[Any],
        folder: Path,
        group: mx.distributed.Group,
    ):
        self._model, self._path, self._group = model, folder / REFERENCE, group
        self._examples = [*train, *valid]
        width = max((len(_scored(example)) for example in self._examples), default=0)
        self._values = np.full((len(self._examples), width), np.nan, np.float32)
        self.train, self.valid = self._values[: len(train)], self._values[len(train) :]

    def complete(self, read: Collection[int], step: int, limit: int, listener: Listener) -> bool:
        """Compute what is not kept, with at most `limit` tokens at once; False if the listener stopped it.

        `read`: indexes of the training examples that the run reads; the others are never asked for, and stay unknown.

        Raises TrainingError for a run that is past its first step and has no complete file, and for a damaged file.
        """
        self._read()
        sequences = [s for example in self._examples for s in _scored(example)]
        flat = self._values.reshape(-1)
        needed = np.ones_like(self._values, bool)
        needed[: len(self.train)] = np.isin(np.arange(len(self.train)), [*read])[:, None]
        needed = needed.reshape(-1)
        missing: list[int] = np.flatnonzero(needed & np.isnan(flat)).tolist()
        if missing and step:
            raise TrainingError(
                f"{self._path} has not all log-probabilities of the model before this run; {_START_OVER}"
            )
        missing.sort(key=lambda i: len(sequences[i]))
        lengths = {i: len(sequences[i]) - 1 for i in missing}
        groups = within(missing, lengths, limit)
        self._model.eval()
        kept, ranks = time.monotonic(), self._group.size()
        for first in range(0, len(groups), ranks):
            scores = np.zeros(len(flat), np.float32)
            if first + self._group.rank() < len(groups):
                members = groups[first + self._group.rank()]
                scores[members] = sequence_scores(self._model, [sequences[i] for i in members], limit=limit)
            scores = self._sum(scores)
            done = [i for group in groups[first : first + ranks] for i in group]
            flat[done] = scores[done]
            listener.scored(int((needed & ~np.isnan(flat)).sum()), int(needed.sum()))
            stop = self._sum(np.array([listener.stop()], np.float32))[0] > 0
            if stop or time.monotonic() - kept > _KEPT_EVERY or first + ranks >= len(groups):
                self._write()
                kept = time.monotonic()
            if stop:
                return False
        return True

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Over all ranks."""
        if self._group.size() == 1:
            return values
        return np.array(mx.distributed.all_sum(mx.array(values), group=self._group))

    def _read(self) -> None:
        """Take what is kept, on the first rank, and tell it to the others."""
        kept = np.full_like(self._values, np.nan)
        if self._group.rank() == 0 and self._path.is_file():
            try:
                arrays = read_arrays(self._path)
            except CheckpointError as error:
                raise TrainingError(f"{self._path} is damaged ({error}); {_START_OVER}") from error
            stored = arrays.get("log_probs")
            if stored is None or stored.shape != self._values.shape:
                raise TrainingError(f"{self._path} is of other data; {_START_OVER}")
            kept = np.array(stored)
        known = self._sum((~np.isnan(kept)).astype(np.float32)) > 0
        values = self._sum(np.nan_to_num(kept))
        self._values[known] = values[known]

    def _write(self) -> None:
        if self._group.rank():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self._path) as file:
            mx.save_safetensors(file, {"log_probs": mx.array(self._values)})


def _scored(example: Any) -> tuple[Example, ...]:
    scored: tuple[Example, ...] = getattr(example, "scored", ())
    return scored


def sequence_scores(model: Model, sequences: Sequence[Example], *, limit: int) -> list[float]:
    """The sum of log p of the trained tokens of each sequence, with at most `limit` tokens at once, no gradients."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    lengths = {i: len(sequences[i]) - 1 for i in order}
    scores = [0.0] * len(sequences)
    for members in within(order, lengths, limit):
        chosen = [sequences[i] for i in members]
        with turn():
            values = np.array(log_probs(model, make_part(chosen))).astype(np.float64)
        ends = np.cumsum([int(sequence.trained.sum()) for sequence in chosen])
        for i, some in zip(members, np.split(values, ends[:-1]), strict=True):
            scores[i] = float(some.sum())
    return scores
