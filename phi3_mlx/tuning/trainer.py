"""The training loop: steps, validation, checkpoints, and what is done when something goes wrong.

It knows no files but checkpoints, no text and no terminal; `run.py` gives it all that, and hears of it by events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import TrainingError
from ..fields import Fields
from ..models.decoder import Model
from ..models.dropout import token_keys
from ..threads import turn
from . import optimizers
from .batches import Part, counts, split_parts, within
from .checkpoints import read_checkpoint, save_checkpoint
from .course import Course
from .events import Listener, StepReport
from .examples import Example
from .gradients import Gradients
from .reference import Reference, sequence_scores
from .run_settings import RunSettings
from .settings import Settings

_NAMED = 3  # examples that a sentence names


@dataclass
class TrainingProgress:
    """Where a run is; what a checkpoint's state.json holds."""

    step: int = 0  # steps done
    tokens: int = 0  # read in them
    trained_tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_accuracy: float | None = None  # where the best is that with the highest
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
            best_accuracy=None if state.raw.get("best_accuracy") is None else state.number("best_accuracy"),
            best_step=None if state.raw.get("best_step") is None else state.whole("best_step"),
            last_loss=loss("last_loss"),
            worse=state.whole("worse"),
        )


class Trainer:
    """One run over `train`. `weights_of` names the trained arrays; ranks of a distributed group share every batch."""

    def __init__(
        self,
        model: Model,
        train: Sequence[Any],
        valid: Sequence[Any],
        settings: RunSettings,
        checkpoints: Path,
        identity: Mapping[str, Any],
        listener: Listener | None = None,
        group: mx.distributed.Group | None = None,
        course: Course | None = None,
    ):
        """`train` and `valid` are the objective's examples. `course`: that of fine-tuning by default."""
        self.model, self.train, self.valid, self.settings = model, train, valid, settings
        self.identity, self._checkpoints = identity, checkpoints
        self._listener = listener or Listener()
        self._group = group or mx.distributed.init()
        self.rank, self._ranks = self._group.rank(), self._group.size()
        self._lengths, self._trained = counts(train)
        if course is None:
            assert isinstance(settings, Settings)
            course = Course.of_tuning(settings, self._lengths)
        self.objective, self.schedule, self._rate = course.objective, course.batches, course.rate
        default = min(100, self.schedule.steps_per_epoch)
        self.validate_every = settings.validate_every or default
        self.save_every = settings.save_every or self.validate_every
        self.progress = TrainingProgress()
        self._optimizer = course.optimizer
        self._optimizer.init(model.trainable_parameters())
        self._gradients = Gradients(model, self.objective, checkpoint=settings.gradient_checkpointing)
        self._reference: Reference | None = None
        self._train_references: np.ndarray | None = None
        self._valid_references: np.ndarray | None = None
        if self.objective.reads_reference:
            self._reference = Reference(model, train, valid, checkpoints, self._group)
            self._train_references, self._valid_references = self._reference.train, self._reference.valid
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
                other = self.settings.changed(before.fields(key).raw, value, str(path))
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
        if not self.read_reference():
            return False
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

    def read_reference(self) -> bool:
        """Have the reference's log-probabilities, if the objective asks for them; False if `listener.stop` said so."""
        if self._reference is None:
            return True
        return self._reference.complete(self.schedule.read(), self.progress.step, self._largest, self._listener)

    def _is_exhausted(self) -> bool:
        """Whether as many validations as `patience` allows were not better."""
        return self.settings.patience is not None and self.progress.worse >= self.settings.patience

    def _step(self) -> StepReport:
        started = time.perf_counter()
        settings, step = self.settings, self.progress.step
        self.model.train()
        batch = self.schedule.batch(step)
        total = self.objective.count([self.train[i] for i in batch])
        loss, gradients, figures = self.gradients(step)
        if self._ranks > 1:
            gradients = tree_map(lambda g: mx.distributed.all_sum(g, group=self._group), gradients)
        value = self._sum(loss)[0] / total
        norm = float(optimizers.gradient_length(gradients)) / total
        if not math.isfinite(value) or not math.isfinite(norm):
            self._diverged(batch, value, norm)
        factor = min(1.0, settings.clip / norm if settings.clip and norm else 1.0) / total
        gradients = tree_map(lambda g, a: (g * factor).astype(a.dtype), gradients, self.model.trainable_parameters())
        rate = self._rate(step)
        self._optimizer.learning_rate = rate
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)
        tokens = int(self._lengths[batch].sum())
        self.progress.step += 1
        self.progress.tokens += tokens
        trained = int(self._trained[batch].sum())
        self.progress.trained_tokens += trained
        return StepReport(
            self.progress.step,
            self.schedule.steps,
            self.progress.step / self.schedule.steps_per_epoch,
            value,
            rate,
            norm,
            tokens,
            trained,
            time.perf_counter() - started,
            mx.get_peak_memory(),
            self._means(figures),
        )

    def gradients(self, step: int) -> tuple[float, Any, mx.array]:
        """Loss, gradients and figures, summed over the examples of this rank's parts of a step's batch."""
        batch = self.schedule.batch(step)
        shared = self._shared(self.train, batch, self._train_references)
        parts = split_parts(batch, self._lengths, self.settings.accumulate * self._ranks)
        return self._gradients.of_parts(
            self._part(members, step, shared) for members in parts[self.rank :: self._ranks] if members
        )

    def _part(self, members: Sequence[int], step: int, shared: float) -> tuple[Part, mx.array | None]:
        """Examples as the model reads them, and what dropout draws in this step: the same in whatever part they are."""
        references = self._references(self._train_references, members)
        part = self.objective.part([self.train[i] for i in members], references, shared)
        lengths = self._lengths[members].tolist()
        keys = token_keys(self.settings.seed, step, members, lengths) if self.settings.dropout else None
        return part, keys

    def _references(self, known: np.ndarray | None, members: Sequence[int]) -> list[list[float]]:
        """The reference's log-probabilities of these examples; of each none where nothing is compared with it."""
        return [[] for _ in members] if known is None else known[members].tolist()

    def _shared(self, examples: Sequence[Any], members: Sequence[int], references: np.ndarray | None) -> float:
        """What the losses of these examples share. Every rank of a group computes it, from the whole batch."""
        return self.objective.shared([examples[i] for i in members], self._references(references, members), self._score)

    def _score(self, sequences: Sequence[Example]) -> list[float]:
        """Sums of log p of the trained tokens, without gradients."""
        training = self.model.training
        self.model.eval()
        scores = sequence_scores(self.model, sequences, limit=self._largest)
        self.model.train(training)
        return scores

    def _means(self, figures: mx.array) -> dict[str, float]:
        """Sums and counts (2, n) as means by name, over all ranks; what was counted nowhere is left out."""
        names = self.objective.figures
        values = self._sum(*figures.reshape(-1)) if names else []
        pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}

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
        """The objective's mean over the validation examples (SFT: of -log p over their trained tokens), dropout off."""
        return self._validation()[0]

    def _validation(self) -> tuple[float, dict[str, float]]:
        """(loss, figures) of the validation examples."""
        self.model.eval()
        objective, valid, references = self.objective, self.valid, self._valid_references
        loss, count, figures = 0.0, 0, mx.zeros((2, len(objective.figures)))
        size = self.settings.batch_size
        lengths = counts(valid)[0]
        in_order = sorted(range(len(valid)), key=lambda i: lengths[i])
        groups = [in_order[i : i + size] for i in range(0, len(in_order), size)]
        for members in groups[self.rank :: self._ranks]:
            with turn():
                shared = self._shared(valid, members, references)
                for some in within(members, lengths, self._largest):
                    part = objective.part([valid[i] for i in some], self._references(references, some), shared)
                    value, told = objective.loss(self.model, part)
                    loss += float(value)
                    figures = figures + told
                    mx.eval(figures)
            count += objective.count([valid[i] for i in members])
        total, divisor = self._sum(loss, count)
        return total / divisor, self._means(figures)

    @property
    def _largest(self) -> int:
        return int(self._lengths.max()) * max(1, self.settings.batch_size // self.settings.accumulate)

    def _validate(self) -> None:
        (loss, figures), progress = self._validation(), self.progress
        finite = math.isfinite(loss)
        if not finite and (progress.last_loss is None or math.isfinite(progress.last_loss)):  # said once, not always
            step, whose = progress.step, self._no_numbers()
            self._listener.noted(
                f"the validation loss at step {step} is not finite{whose}; it does not count as better"
            )
        accuracy = figures.get("accuracy") if self.settings.best_by == "accuracy" else None
        best = finite and self._is_better(loss, accuracy)
        progress.last_loss = loss
        if best:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            progress.best_accuracy = accuracy
        else:
            progress.worse += 1
        self._listener.validated(progress.step, loss, best, figures)

    def _is_better(self, loss: float, accuracy: float | None) -> bool:
        """Than the best so far: by accuracy, if that counts and is another, else by loss."""
        best = self.progress
        if accuracy is not None and best.best_accuracy is not None and accuracy != best.best_accuracy:
            return accuracy > best.best_accuracy
        return best.best_loss is None or loss < best.best_loss

    def _no_numbers(self) -> str:
        """The validation examples whose loss is not finite, as a part of a sentence."""
        named = []
        for i, example in enumerate(self.valid):
            with turn():
                shared = self._shared(self.valid, [i], self._valid_references)
                part = self.objective.part([example], self._references(self._valid_references, [i]), shared)
                loss = float(self.objective.loss(self.model, part)[0])
            if not math.isfinite(loss):
                named.append(example.source)
            if len(named) > _NAMED:
                break
        more = ", ..." if len(named) > _NAMED else ""
        return f" for {', '.join(named[:_NAMED])}{more}" if named else ""
