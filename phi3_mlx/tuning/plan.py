"""How much memory a run will take, reckoned from config and headers before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint import DTYPES
from ..config import Phi3Config
from ..errors import MemoryLimitError
from ..safetensors import Tensor, find_weights
from .batches import Plan
from .loss import LOGITS_AT_ONCE
from .settings import Settings
from .targets import Target, find_targets

# Fitted to measured peaks, of 73 MB to 1.3 GB, of float32 runs on the CPU: how many copies of what live at once.
_LINEAR, _SCORES, _LOGITS, _MARGIN = 0.7, 1.2, 4, 1.1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run at its largest step."""

    weights: int
    trained: int  # the trained arrays, their gradients and the optimizer's state
    activations: int  # what the backward pass needs, and the layer being computed
    logits: int
    part_tokens: int  # of the largest part that is computed at once

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.logits


def trained_numbers(config: Phi3Config, settings: Settings, tensors: dict[str, Tensor]) -> int:
    """How many numbers a run with these settings trains."""
    if settings.method == "full":
        return sum(_count(tensor) for tensor in tensors.values())

    def size(target: Target) -> int:
        magnitudes = target.rows if settings.method == "dora" else 0
        return settings.rank * len(target.parts) * (target.columns + target.rows) + magnitudes

    return sum(map(size, find_targets(config, settings.targets, settings.layers)))


def plan_memory(
    directory: Path, config: Phi3Config, settings: Settings, lengths: Sequence[int], ranks: int = 1
) -> MemoryPlan:
    """The plan of a run over examples of these lengths (tokens read of each)."""
    tensors = find_weights(directory).tensors
    item = compute_size(config, settings)
    weights = sum(
        tensor.nbytes if tensor.dtype.startswith(("U", "I")) else _count(tensor) * item for tensor in tensors.values()
    )
    numbers = trained_numbers(config, settings, tensors)
    kept = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 1}[settings.optimizer]
    # Full fine-tuning trains the weights themselves, which are counted already.
    own = item if settings.method == "full" else 4
    copies = (0 if settings.method == "full" else 1) + 2 + kept  # gradients of a part and their sum
    plan = Plan(
        lengths,
        settings.batch_size,
        steps=settings.steps,
        epochs=settings.epochs,
        order=settings.order,
        seed=settings.seed,
    )
    tokens, scores = plan.largest_part(settings.accumulate * ranks)
    scores *= config.num_attention_heads
    layers = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    kept_by_layers = layers * (_LINEAR * _layer_numbers(config, settings) * tokens + _SCORES * scores)
    between_layers = 2 * tokens * config.hidden_size * config.num_hidden_layers
    # The layer in work: its attention once more, and its weights as floats.
    in_work = 2 * _SCORES * scores + 4 * config.hidden_size * 2 * config.intermediate_size
    activations = item * _MARGIN * (kept_by_layers + between_layers + in_work)
    logits = 4 * _LOGITS * min(LOGITS_AT_ONCE, tokens * config.vocab_size) + item * 2 * tokens * config.hidden_size
    return MemoryPlan(weights, numbers * own * copies, int(activations), logits, tokens)


def _layer_numbers(config: Phi3Config, settings: Settings) -> int:
    """Activations of one decoder layer for one token that the backward pass needs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    # Two norms, two sums, the projections' outputs; queries, keys and values as they are, in blocks and rotated.
    attention = 5 * hidden + 4 * (heads + keys) + 2 * heads
    return attention + 6 * inner + (hidden + inner if settings.dropout else 0)


def compute_size(config: Phi3Config, settings: Settings) -> int:
    """Bytes of a number in the type that the run computes in."""
    if settings.dtype is not None:
        return DTYPES[settings.dtype].size
    if settings.method == "full" or mx.default_device().type == mx.DeviceType.cpu:
        return 4
    return 4 if config.dtype == "float32" else 2


def refuse_if_too_large(
    needed: MemoryPlan, settings: Settings, available: int, replan: Callable[[Settings], MemoryPlan]
) -> None:
    """Raise MemoryLimitError, with the numbers and what would make the run fit, if it does not.

    `replan` gives the plan of changed settings.
    """
    limit = int(settings.memory * 1e9) if settings.memory is not None else available
    if needed.total <= limit:
        return
    raise MemoryLimitError(
        f"this run needs about {_gb(needed.total)} GB (weights {_gb(needed.weights)}, training {_gb(needed.trained)}, "
        f"activations {_gb(needed.activations + needed.logits)} for {needed.part_tokens:,} tokens at once) and "
        f"{_gb(limit)} GB are to be had; {_way_out(settings, limit, replan)}"
    )


def _way_out(settings: Settings, limit: int, replan: Callable[[Settings], MemoryPlan]) -> str:
    """The flags of the first milder settings that fit; how far they get where none does."""
    now = settings
    flags: list[str] = []
    for change in (
        {"gradient_checkpointing": True},
        {"accumulate": max(2, settings.batch_size // 2)},
        {"accumulate": settings.batch_size},
    ):
        name, value = next(iter(change.items()))
        if getattr(now, name) == value or (name == "accumulate" and value > settings.batch_size):
            continue
        now = dataclasses.replace(now, **change)
        flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        flags = [f for f in flags if f.split()[0] != flag.split()[0]] + [flag]
        if replan(now).total <= limit:
            return f"it would fit with {' '.join(flags)}"
    length = now.max_length or 0
    while length > 64:
        length //= 2
        shorter = dataclasses.replace(now, max_length=length)
        if replan(shorter).total <= limit:
            return f"it would fit with {' '.join([*flags, f'--max-length {length}'])}"
    least = replan(dataclasses.replace(now, max_length=64))
    with_what = " ".join(flags) or "short examples"
    return f"even with {with_what} it needs {_gb(least.total)} GB; take a 4-bit base or a smaller model"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _count(tensor: Tensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count
