"""mlx-lm's own ways to quantize, for `bench quantization --beside`: each makes a model directory of one in floats.

They read the text that ours read and compute in float32, as ours do on a CPU; what they store has the dtype of ours.
Where their defaults ask for thousands of samples of a thousand tokens, a run takes this text once, in windows: DWQ in
steps of one window at the rates below, with every fourth window for its validation. On a CPU DWQ's packed products are
made of dequantized weights (`in_floats`): the same numbers many times sooner, in more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from phi3_mlx.models.linear import plain_weight

METHODS = ("uniform", "gptq", "awq", "dynamic", "dwq")
_WIDTHS = (2, 3, 4, 5, 6, 8)
_DWQ_RATES = {3: 4e-5, 4: 2e-5}  # of Adam: about how far a scale moves in a step
_DWQ_RATE = 2e-5  # of other widths
_AT_ONCE = 4  # windows of a pass; mlx-lm's default for gradients


@dataclass(frozen=True)
class Task:
    """A model directory in floats (`source`), and what is to be made of it: `bits` in groups, or their size between.

    `rows` (windows, length) are the ids of the calibration text; `bits_per_weight` is the size that "dynamic" aims at.
    """

    source: Path
    rows: mx.array
    bits: int
    group_size: int
    bits_per_weight: float
    dtype: mx.Dtype


def make(method: str, task: Task, target: Path) -> None:
    """Write what `method` makes of the task. NotImplementedError says what mlx-lm does not do."""
    from mlx_lm.utils import load_model, save_config, save_model

    model, config = load_model(task.source)
    model.set_dtype(mx.float32)
    model, config = _WAYS[method](model, config, task)
    model.set_dtype(task.dtype)
    mx.eval(model.parameters())
    save_model(target, model)
    save_config(config, config_path=target / "config.json")


def _uniform(model: Any, config: dict[str, Any], task: Task) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    return quantize_model(model, config, group_size=task.group_size, bits=task.bits)


def _gptq(model: Any, config: dict[str, Any], task: Task) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.quant.gptq import gptq_quantize

    if task.bits not in (2, 4, 8):  # an assertion there
        raise NotImplementedError(f"mlx-lm's GPTQ has no {task.bits} bits")
    packing = (task.bits, task.group_size)
    model, recipe = gptq_quantize(model, task.rows, *packing, *packing, batch_size=_AT_ONCE)
    return model, {**config, "quantization": recipe}


def _awq(model: Any, config: dict[str, Any], task: Task) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    plan = AWQ_MODEL_CONFIGS.get(config["model_type"])
    if plan is None:
        raise NotImplementedError(f"mlx-lm's AWQ has no {config['model_type']}")
    packing = {"bits": task.bits, "group_size": task.group_size}
    embedding = {f"embed_{key}": value for key, value in packing.items()}
    awq_quantize(model, task.rows, plan, **packing, **embedding)
    return model, {**config, "quantization": packing}


def _dynamic(model: Any, config: dict[str, Any], task: Task) -> tuple[Any, dict[str, Any]]:
    """Bits above and below by sensitivity, with as many layers above as bring the model nearest to the size."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities
    from mlx_lm.utils import quantize_model

    at = _WIDTHS.index(task.bits)
    if not 0 < at < len(_WIDTHS) - 1:
        raise NotImplementedError(f"no bits below and above {task.bits}")
    low, high = ({"bits": bits, "group_size": task.group_size} for bits in (_WIDTHS[at - 1], _WIDTHS[at + 1]))
    ends = (low["bits"], task.group_size, high["bits"], task.group_size)
    sensitivities = dict(estimate_sensitivities(model, task.rows, *ends, batch_size=_AT_ONCE))
    above = _most_sensitive(model, sensitivities, task, low["bits"], high["bits"])

    def width(path: str, module: Any) -> bool | dict[str, int]:
        return dict(high) if path in above else True

    return quantize_model(model, config, **low, quant_predicate=width)


def _most_sensitive(model: Any, sensitivities: dict[str, float], task: Task, low: int, high: int) -> set[str]:
    """The layers that get `high` bits; the others get `low`.

    Not by mlx-lm's `estimate_threshold`: it counts scales as wide as the model computes, in float32 twice what is
    stored, and ends on either side of the layer that passes the size, which in a small model is half of the weights.
    """
    modules = dict(model.named_modules())
    weights = {path: modules[path].weight.size for path in sensitivities}
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    stored = 8 * task.dtype.size
    size = stored * (total - sum(weights.values())) + (low + 2 * stored / task.group_size) * sum(weights.values())
    above = sorted(sensitivities, key=sensitivities.__getitem__, reverse=True)
    sizes = np.cumsum([size, *((high - low) * weights[path] for path in above)])
    return set(above[: np.abs(sizes - task.bits_per_weight * total).argmin()])


def _dwq(model: Any, config: dict[str, Any], task: Task) -> tuple[Any, dict[str, Any]]:
    """Uniform rounding, whose scales and biases are then trained; the source stays in memory."""
    from copy import deepcopy

    import mlx.optimizers as optim
    from mlx_lm.quant.dwq import dwq_quantize

    student, made = _uniform(deepcopy(model), config, task)
    if mx.default_device().type == mx.DeviceType.cpu:
        in_floats(student)
    rows = [list(map(int, row)) for row in np.array(task.rows)]
    held_out = [(row, 0) for row in rows[3::4]]
    fitted = [(row, 0) for i, row in enumerate(rows) if i % 4 != 3]
    dwq_quantize(
        student,
        lambda batch, _, split: model(batch),
        optim.Adam(learning_rate=_DWQ_RATES.get(task.bits, _DWQ_RATE), bias_correction=True),
        fitted,
        held_out,
        batch_size=1,
        max_seq_length=len(rows[0]) + 1,
        seed=0,
        dtype=mx.float32,
    )
    return student, made


class _LinearInFloats(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        product = x @ plain_weight(self).T
        return product + self.bias if "bias" in self else product


class _EmbeddingInFloats(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return x @ plain_weight(self).T


def in_floats(model: nn.Module) -> None:
    """Let packed layers multiply by their weights as floats, through which gradients reach scales and biases."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):
            module.__class__ = _LinearInFloats
        elif isinstance(module, nn.QuantizedEmbedding):
            module.__class__ = _EmbeddingInFloats


_WAYS: dict[str, Callable[[Any, dict[str, Any], Task], tuple[Any, dict[str, Any]]]] = {
    "uniform": _uniform,
    "gptq": _gptq,
    "awq": _awq,
    "dynamic": _dynamic,
    "dwq": _dwq,
}
