"""Which model read something: in this process by its arrays, in a file by a digest of every number."""

from __future__ import annotations

import copy
import hashlib
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..models.attention import on_cuda
from ..models.decoder import Model

_SUMMED = 1 << 22  # numbers of a weight whose sums are taken at a time


class ModelState:
    """The weights that a model has now and how it uses them; weights are not kept alive.

    Loading others, casting, an adapter that comes, goes or counts differently, and a number that is written into a
    weight in place (`weight[0] = 1`) make another state. On an NVIDIA GPU the last does not.
    """

    def __init__(self, model: Model):
        arrays = [array for _, array in tree_flatten(model.parameters())]
        # Other objects of the same arrays, so that writing into one gives it another place in memory. They go with it.
        held = {i: copy.copy(array) for i, array in enumerate(arrays)}
        self._arrays = [(_reference(array, held, i), _place(array)) for i, array in enumerate(arrays)]
        self._settings = _settings(model)
        self._fingerprint: str | None = None

    def fingerprint(self, model: Model) -> str:
        """`model_fingerprint` of the model, which is in this state; its weights are read once."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(model)
        return self._fingerprint

    def is_of(self, model: Model) -> bool:
        """Whether the model is in this state."""
        arrays = [array for _, array in tree_flatten(model.parameters())]
        return (
            len(arrays) == len(self._arrays)
            and all(kept() is array for (kept, _), array in zip(self._arrays, arrays, strict=True))
            and not self.gone
            and _settings(model) == self._settings
        )

    @property
    def gone(self) -> bool:
        """Whether no model can be in this state any more."""
        return any((array := kept()) is None or _place(array) != place for kept, place in self._arrays)


def _reference(array: mx.array, held: dict[int, mx.array], key: int) -> weakref.ref[mx.array]:
    """A weak reference to an array, whose end takes what is held under `key` along."""
    return weakref.ref(array, lambda _: held.pop(key, None))


def _place(array: mx.array) -> int:
    """Where an array's numbers stand in memory; 0 on an NVIDIA GPU, from which a look at them would move them."""
    if on_cuda():
        return 0
    return np.frombuffer(memoryview(array).cast("B"), np.uint8).ctypes.data  # type: ignore[arg-type]


def model_fingerprint(model: Model) -> str:
    """Tells models apart by config, names, shapes, types and every number: sums of rows and of columns."""
    digest = hashlib.sha256(repr((model.config, model.model.longrope)).encode())
    if adapters := _adapters(model):
        digest.update(repr(adapters).encode())
    for name, array in tree_flatten(model.parameters()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        flat = array.reshape(-1, array.shape[-1]).view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
        columns = mx.zeros(flat.shape[1], mx.uint32)
        step = max(1, _SUMMED // flat.shape[1])
        for first in range(0, len(flat), step):
            bits = flat[first : first + step].astype(mx.uint32)
            columns, rows = columns + bits.sum(axis=0), bits.sum(axis=1)  # of integers: no order changes them
            mx.eval(columns, rows)
            digest.update(np.array(rows).tobytes())
        digest.update(np.array(columns).tobytes())
    return digest.hexdigest()[:32]


def _settings(model: Model) -> tuple[Any, ...]:
    """What changes the numbers beside the arrays."""
    return model.config, model.model.longrope, _adapters(model)


def _adapters(model: Model) -> list[tuple[str, Any]]:
    """Layer -> its adapters and how much each counts."""
    return [(path, in_use) for path, module in model.named_modules() if (in_use := getattr(module, "in_use", None))]
