"""The training loop: steps, validation, checkpoints, and what is done when something goes wrong.

It knows no files but checkpoints, no text and no terminal; `run.py` gives it all that, and hears of it by events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import TrainingError
from ..fields import Fields
from ..models.decoder import Model
from ..models.dropout import token_keys
from ..threads import turn
from . import optimizers
from .batches import Part, Schedule, make_part, split_parts
from .checkpoints import read_checkpoint, save_checkpoint
from .examples import Example
from .gradients import Gradients
from .loss import part_loss
from .settings import Settings, changed

_NAMED = 3  # examples that a sentence names


@dataclass
class TrainingProgress:
    """Where a run is; what a checkpoint's state.json holds."""

    step: int = 0  # steps done
    tokens: int = 0  # read in them
    trained_tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None  # of the last validation
    worse: int = 0  # validations since the best

    @classmethod
    def of(cls, state: Fields) -> TrainingProgress:
        """That of a checkpoint's state. Raises TrainingError."""

        def loss(key: str) -> float | None:
            value = state.raw.get(key)
            return None if value is None or value != value else state.number(key)  # version 0.1.0 wrote NaN

        return cls(
            step=state.whole("step"),
            tokens=state.whole("tokens", most=2**62),
            trained_tokens=state.whole("trained_tokens", most=2**62),
            best_loss=loss("best_loss"),
            best_step=None if state.raw.get("best_step") is None else state.whole("best_step"),
            last_loss=loss("last_loss"),
            worse=state.whole("worse"),
        )


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the mean over its trained tokens, before the update; memory in bytes."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    peak_memory: int


@dataclass
class Listener:
    """What a run tells while it goes on; every function may be replaced."""

    step: Callable[[StepReport], None] = field(default=lambda report: None)
    noted: Callable[[str], None] = field(default=lambda sentence: None)  # what went wrong, and the run goes on
    validated: Callable[[int, float, bool], None] = field(default=lambda step, loss, best: None)
    saved: Callable[[Path], None] = field(default=lambda path: None)
    stop: Callable[[], bool] = field(default=lambda: False)  # asked after every step


class Trainer:
    """One run over `train`. `weights_of` names the trained arrays; ranks of a distributed group share every batch."""

    def __init__(
        self,
        model: Model,
        train: Sequence[Example],
        valid: Sequence[Example],
        settings: Settings,
        checkpoints: Path,
        identity: Mapping[str, Any],
        listener: Listener | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.train, self.valid, self.settings = model, train, valid, settings
        self.identity, self._checkpoints = identity, checkpoints
        self._listener = listener or Listener()
        self._group = group or mx.distributed.init()
        self.rank, self._ranks = self._group.rank(), self._group.size()
        self._lengths = [len(example) - 1 for example in train]
        self.schedule = Schedule.of(self._lengths, settings)
        default = min(100, self.schedule.steps_per_epoch)
        self.validate_every = settings.validate_every or default
        self.save_every = settings.save_every or self.validate_every
        self.progress = TrainingProgress()
        self._optimizer = optimizers.make_optimizer(settings)
        self._optimizer.init(model.trainable_parameters())
        self._gradients = Gradients(model, checkpoint=settings.gradient_checkpointing)
        self._saved_at: int | None = None

    # State

    def weights(self) -> dict[str, mx.array]:
        """The trained arrays by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def is_finite(self) -> bool:
        """Whether no trained number is NaN or infinite."""
        with turn():
            return bool(mx.stack([mx.isfinite(array).all() for array in self.weights().values()]).all().item())

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one. TrainingError: its weights are none to go on from."""
        if self._saved_at == self.progress.step:
            return
        if not self.is_finite():
            raise TrainingError(
                f"trained weights are not finite after step {self.progress.step}; {self._kept()}; start over with a "
                "lower learning_rate"
            )
        if self.rank:
            self._saved_at = self.progress.step
            return
        state = {**vars(self.progress), "identity": dict(self.identity)}
        arrays = optimizers.optimizer_arrays(self._optimizer)
        path = save_checkpoint(self._checkpoints, self.progress.step, self.weights(), arrays, state)
        self._saved_at = self.progress.step
        self._listener.saved(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises TrainingError if it belongs to another run."""
        weights, optimizer, state = read_checkpoint(path)
        before = state.fields("identity")
        for key, value in self.identity.items():
            other: str | None = f"set of {key}" if key.endswith("data") else key
            if key == "setting":
                other = changed(before.fields(key).raw, value, str(path))
            if before.raw.get(key) != value and other is not None:
                raise TrainingError(
                    f"{path} is of a run with another {other}, so going on would not continue it; "
                    f"restore what was used then, or start over in another folder with output=DIR"
                )
        kinds = [{name: (a.shape, a.dtype) for name, a in arrays.items()} for arrays in (weights, self.weights())]
        if kinds[0] != kinds[1]:
            raise TrainingError(
                f"{path} trains other arrays than these settings do; start over in another folder with output=DIR"
            )
        try:
            optimizers.restore_optimizer(self._optimizer, optimizer)
        except ValueError as error:
            raise TrainingError(f"{path} is damaged ({error}); remove it and start over") from error
        self.model.update(tree_unflatten(list(weights.items())))
        self.progress = TrainingProgress.of(state)
        self._saved_at = self.progress.step

    # Steps

    def run(self) -> bool:
        """Train to the end; False if `listener.stop` or the lack of improvement ended it before.

        Raises TrainingError where loss or gradient is not finite, after saving the last good state.
        """
        while self.progress.step < self.schedule.steps and not self._is_exhausted():
            with turn():
                report = self._step()
            self._listener.step(report)
            step = self.progress.step
            last = step == self.schedule.steps
            if self.valid and (last or step % self.validate_every == 0):
                self._validate()
            stop = self._sum(float(self._listener.stop()))[0] > 0
            if last or stop or self._is_exhausted() or step % self.save_every == 0:
                self.save()
            if stop:
                break
        return self.progress.step == self.schedule.steps

    def _is_exhausted(self) -> bool:
        """Whether as many validations as `patience` allows were not better."""
        return self.settings.patience is not None and self.progress.worse >= self.settings.patience

    def _step(self) -> StepReport:
        started = time.perf_counter()
        settings, step = self.settings, self.progress.step
        self.model.train()
        batch = self.schedule.batch(step)
        total = sum(int(self.train[i].trained.sum()) for i in batch)
        loss, gradients = self.gradients(step)
        if self._ranks > 1:
            gradients = tree_map(lambda g: mx.distributed.all_sum(g, group=self._group), gradients)
        value = self._sum(loss)[0] / total
        norm = float(optimizers.gradient_length(gradients)) / total
        if not math.isfinite(value) or not math.isfinite(norm):
            self._diverged(batch, value, norm)
        factor = min(1.0, settings.clip / norm if settings.clip and norm else 1.0) / total
        gradients = tree_map(lambda g, a: (g * factor).astype(a.dtype), gradients, self.model.trainable_parameters())
        rate = optimizers.learning_rate(settings, step, self.schedule.steps)
        self._optimizer.learning_rate = rate
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)
        tokens = sum(self._lengths[i] for i in batch)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.trained_tokens += total
        return StepReport(
            self.progress.step,
            self.schedule.steps,
            self.progress.step / self.schedule.steps_per_epoch,
            value,
            rate,
            norm,
            tokens,
            total,
            time.perf_counter() - started,
            mx.get_peak_memory(),
        )

    def gradients(self, step: int) -> tuple[float, Any]:
        """Loss and gradients, summed over the trained tokens of this rank's parts of a step's batch."""
        parts = split_parts(self.schedule.batch(step), self._lengths, self.settings.accumulate * self._ranks)
        return self._gradients.of_parts(
            self._part(members, step) for members in parts[self.rank :: self._ranks] if members
        )

    def _part(self, members: Sequence[int], step: int) -> tuple[Part, mx.array | None]:
        """Examples as the model reads them, and what dropout draws in this step: the same in whatever part they are."""
        part = make_part([self.train[i] for i in members])
        keys = token_keys(self.settings.seed, step, members, part.lengths) if self.settings.dropout else None
        return part, keys

    def _diverged(self, batch: Sequence[int], loss: float, norm: float) -> None:
        """The update was not made: keep the weights, if the one before did not spoil them, and name the batch."""
        if self.is_finite():
            self.save()
        sources = [self.train[i].source for i in batch]
        larger = ", give dtype='bfloat16'" if self.model.dtype == mx.float16 else ""
        named = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
        raise TrainingError(
            f"loss {loss} and gradient {norm} at step {self.progress.step + 1} are not finite; the batch was {named}; "
            f"{self._kept()}; lower learning_rate{larger} or look at these examples"
        )

    def _kept(self) -> str:
        """Where the last good state is, as a part of a sentence."""
        if self._saved_at is None:
            return "nothing was saved yet"
        return f"the state after step {self._saved_at} is kept in {self._checkpoints}"

    def _sum(self, *values: Any) -> list[float]:
        """Numbers added up over all ranks."""
        array = mx.stack([mx.array(value, dtype=mx.float32) for value in values])
        if self._ranks > 1:
            array = mx.distributed.all_sum(array, group=self._group)
        return array.tolist()  # type: ignore[return-value]

    # Validation

    def validation_loss(self) -> float:
        """Mean -log p over the trained tokens of the validation examples, dropout off."""
        self.model.eval()
        loss, count = 0.0, 0
        size = self.settings.batch_size
        in_order = sorted(range(len(self.valid)), key=lambda i: len(self.valid[i]))
        groups = [in_order[i : i + size] for i in range(0, len(in_order), size)]
        for members in groups[self.rank :: self._ranks]:
            lengths = {i: len(self.valid[i]) - 1 for i in members}
            for some in _within(members, lengths, self._largest):
                part = make_part([self.valid[i] for i in some])
                with turn():
                    loss += float(part_loss(self.model, part))
                count += part.targets.size
        total, tokens = self._sum(loss, count)
        return total / tokens

    @property
    def _largest(self) -> int:
        return max(self._lengths) * max(1, self.settings.batch_size // self.settings.accumulate)

    def _validate(self) -> None:
        loss, progress = self.validation_loss(), self.progress
        finite = math.isfinite(loss)
        if not finite and (progress.last_loss is None or math.isfinite(progress.last_loss)):  # said once, not always
            step, whose = progress.step, self._no_numbers()
            self._listener.noted(
                f"the validation loss at step {step} is not finite{whose}; it does not count as better"
            )
        best = finite and (progress.best_loss is None or loss < progress.best_loss)
        progress.last_loss = loss
        if best:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        else:
            progress.worse += 1
        self._listener.validated(progress.step, loss, best)

    def _no_numbers(self) -> str:
        """The validation examples whose loss is not finite, as a part of a sentence."""
        named = []
        for example in self.valid:
            with turn():
                loss = float(part_loss(self.model, make_part([example])))
            if not math.isfinite(loss):
                named.append(example.source)
            if len(named) > _NAMED:
                break
        more = ", ..." if len(named) > _NAMED else ""
        return f" for {', '.join(named[:_NAMED])}{more}" if named else ""


def _within(members: Iterable[int], lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Members in groups of at most `limit` tokens, or of one member."""
    groups: list[list[int]] = []
    size = 0
    for i in members:
        if not groups or size + lengths[i] > limit:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += lengths[i]
    return groups
