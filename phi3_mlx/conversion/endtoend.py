"""Distillation: a packed model's scales and biases trained towards its source's next-token distributions.

The source is not in memory: its distributions were written to a file before (`teacher`). A checkpoint after every few
steps has all that the next step needs, so a run that was killed goes on and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config import Config
from ..errors import CheckpointError
from ..models import build
from ..models.decoder import Model
from ..models.hooks import get_layer, set_layer
from ..store.atomic import new_file
from .gains import Gain
from .layerwise import EMBEDDING
from .teacher import Teacher
from .trained import Trained, TrainedEmbedding, TrainedLinear

ROWS = 2  # windows of a step
EPOCHS = 3
_RATE = 1e-3
_WARMUP = 0.1  # of all steps
STUDENT_SETTINGS = (ROWS, EPOCHS, _RATE, _WARMUP)  # what a run's result depends on
_CHECKPOINT_EVERY = 60  # seconds between two checkpoints


@dataclass
class _Place:
    """Where a run is. `held` and `best_held` are KL on the rows held out, before training and of the best state."""

    step: int
    before: float
    held: float
    best_held: float


class Student:
    """A packed model whose scales and biases are trained. `arrays`: its tensors by name, packed as `packings` says."""

    def __init__(self, config: Config, arrays: Mapping[str, mx.array], packings: Mapping[str, Mapping[str, Any]]):
        self.model = trainable_model(config, arrays, packings)
        self.trained: dict[str, Trained] = {
            f"{path}.weight": module for path, module in self.model.named_modules() if isinstance(module, Trained)
        }

    def train(self, teacher: Teacher, checkpoint: Path, progress: Callable[[int, int], None]) -> Gain:
        """Train, and keep the state of least KL on the rows held out, be it the first. Goes on from `checkpoint`."""
        order, an_epoch = _order(teacher.fitted), math.ceil(teacher.fitted / ROWS)
        optimizer = optim.Adam(learning_rate=_schedule(len(order)), bias_correction=True)
        optimizer.init(self.model.trainable_parameters())
        seen = slice(0, min(teacher.fitted, len(teacher.ids) - teacher.fitted))
        unseen = slice(teacher.fitted, len(teacher.ids))
        if checkpoint.exists():
            place, best = self._go_on(checkpoint, optimizer)
        else:
            held, best = self._divergence(teacher, unseen), self._state()
            place = _Place(0, self._divergence(teacher, seen), held, held)
        step = nn.value_and_grad(self.model, lambda rows: self._loss(teacher, rows))
        kept = time.monotonic()
        progress(place.step, len(order))
        while place.step < len(order):
            _, gradients = step(mx.array(order[place.step]))
            optimizer.update(self.model, gradients)
            mx.eval(self.model.trainable_parameters(), optimizer.state)
            place.step += 1
            if place.step % an_epoch == 0:
                held = self._divergence(teacher, unseen)
                if held < place.best_held:
                    place.best_held, best = held, self._state()
            if time.monotonic() - kept > _CHECKPOINT_EVERY or place.step == len(order):
                _keep(checkpoint, place, self._state(), best, optimizer)
                kept = time.monotonic()
            progress(place.step, len(order))
        self.model.update(tree_unflatten(list(best.items())))
        return Gain(place.before, self._divergence(teacher, seen), place.held, place.best_held)

    def _loss(self, teacher: Teacher, rows: mx.array) -> mx.array:
        ids = teacher.ids[rows]
        hidden = self.model.model.end_to_end(ids.reshape(1, -1), [ids.shape[1]] * len(ids), checkpoint=True)
        return teacher.divergence(self.model.logits(hidden)[0], rows)

    def _divergence(self, teacher: Teacher, rows: slice) -> float:
        """The mean KL over these rows."""
        total = 0.0
        for start in range(rows.start, rows.stop, ROWS):
            here = mx.arange(start, min(start + ROWS, rows.stop))
            total += float(self._loss(teacher, here)) * len(here)
            mx.clear_cache()
        return total / (rows.stop - rows.start)

    def _state(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _go_on(self, checkpoint: Path, optimizer: optim.Optimizer) -> tuple[_Place, dict[str, mx.array]]:
        """The place in the run and the best state so far of a checkpoint, whose state the model and optimizer take."""
        try:
            loaded: Any = mx.load(str(checkpoint), format="safetensors", return_metadata=True)
            arrays, metadata = loaded
            place = _Place(**json.loads(metadata["place"]))
            now, best, state = (_within(arrays, part) for part in ("now", "best", "optimizer"))
            self.model.update(tree_unflatten(list(now.items())))
            optimizer.state = tree_unflatten(list(state.items()))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint} cannot be read ({error}); remove it") from error
        mx.eval(self.model.trainable_parameters(), optimizer.state, best)
        return place, best


def trainable_model(config: Config, arrays: Mapping[str, mx.array], packings: Mapping[str, Mapping[str, Any]]) -> Model:
    """The model of these tensors in float32, trainable in the scales and biases of what is packed."""
    model = build(config)  # random weights, never computed: all are replaced
    packed = {name.removesuffix(".weight") for name in packings}
    floats = [(name, array) for name, array in arrays.items() if name.rpartition(".")[0] not in packed]
    floats += [(name, array) for name, array in arrays.items() if name.endswith(".bias") and name[:-5] in packed]
    model.load_weights([(name, array.astype(mx.float32)) for name, array in floats], strict=False)
    mx.eval([array for _, array in floats])
    model.freeze()
    for name, packing in packings.items():
        path = name.removesuffix(".weight")
        parts = [arrays[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        if path == EMBEDDING:
            model.model.embed_tokens = TrainedEmbedding(parts, packing)
        else:
            set_layer(model, path, TrainedLinear(get_layer(model, path), parts, packing))
    model.train()
    return model


def _order(rows: int) -> list[list[int]]:
    """The rows of each step, the same in every run."""
    steps: list[list[int]] = []
    for epoch in range(EPOCHS):
        shuffled = np.random.default_rng(epoch).permutation(rows).tolist()
        steps += [shuffled[first : first + ROWS] for first in range(0, rows, ROWS)]
    return steps


def _schedule(steps: int) -> Callable[[mx.array], mx.array]:
    warmup = max(1, round(_WARMUP * steps))
    rising, falling = optim.linear_schedule(0.0, _RATE, warmup), optim.cosine_decay(_RATE, max(1, steps - warmup))
    return optim.join_schedules([rising, falling], [warmup])


def _keep(
    checkpoint: Path,
    place: _Place,
    now: Mapping[str, mx.array],
    best: Mapping[str, mx.array],
    optimizer: optim.Optimizer,
) -> None:
    groups = {"now": now, "best": best, "optimizer": dict(tree_flatten(optimizer.state))}
    arrays = {f"{group}.{name}": array for group, named in groups.items() for name, array in named.items()}
    with new_file(checkpoint) as file:
        mx.save_safetensors(file, arrays, metadata={"place": json.dumps(asdict(place))})


def _within(arrays: Mapping[str, mx.array], group: str) -> dict[str, mx.array]:
    return {name.removeprefix(f"{group}."): array for name, array in arrays.items() if name.startswith(f"{group}.")}
