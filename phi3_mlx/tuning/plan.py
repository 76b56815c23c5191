"""How much memory a run will take, computed from config and headers before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..adapters.targets import Target, find_targets
from ..config import Config
from ..errors import MemoryLimitError
from ..models.attention import BLOCK, fused_attention
from ..models.blocksparse import TILE
from ..models.linear import SLICE, dequantizing_pays
from ..sizes import parse_size, size_text
from ..store.checkpoint import ModelSize
from .batches import PartSize, Schedule
from .loss import places_at_once
from .settings import Settings

# How many copies of an array live at once, fitted to measured peaks of float32 runs on the CPU.
_BETWEEN = 4  # of each layer's hidden states; checkpointing keeps them too
_WORK, _WORK_SCORES = 2.1, (2.5, 1.5)  # in the layer in work: activations, attention scores at once or in blocks
_LOGITS, _PIECES, _BOTH = 2.1, 3.5, 0.33  # in the output layer; its pieces at once; how far its and a layer's overlap
# Of a dense model, and of a mixture of experts, whose rows are copied in blocks and whose matrices are unpacked all at
# once, as far ahead as MLX's CPU backend allocates: with large ones 4 stacks, with small ones fewer.
_AGAIN = 1, 2  # layers that checkpointing computes again
_UNPACKED, _SLICES = (3, 4), 4  # unpacked weights; of a dense model no more than slices of them
# Of the layer in work on the CPU, without and with checkpointing, where one part of it is much wider than the others:
# numbers for each of a token's queries and keys, and of the feed-forward part. Norms of 16-bit numbers are in float32.
_QUERIES, _KEYS, _INNER, _NORMS = (19, 25), (10, 18), (14, 21), 10
_UPDATE = 1.25  # new parameters and what they are computed from, beside gradients and state


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of a training run at its largest step."""

    weights: int
    trained: int  # the trained arrays, their gradients and the optimizer's state
    activations: int  # what the backward pass needs, and the layer being computed
    part_tokens: int  # of the largest part that is computed at once

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations


def adapter_numbers(config: Config, settings: Settings) -> int:
    """How many numbers the adapter of a run with these settings has."""

    def size(target: Target) -> int:
        magnitudes = target.rows if settings.method == "dora" else 0
        return settings.rank * len(target.parts) * (target.columns + target.rows) + magnitudes

    return sum(map(size, find_targets(config, settings.targets, settings.layers)))


def plan_memory(
    size: ModelSize,
    settings: Settings,
    lengths: Sequence[int],
    trained: Sequence[int],
    ranks: int = 1,
    *,
    numbers: int | None = None,
) -> TrainingPlan:
    """The plan of a run over examples of these lengths (tokens read of each), of which `trained` are trained.

    `size`: of the model in `training_dtype(settings)`. `numbers`: how many numbers of the model or an adapter are
    trained, if `settings` do not say so.
    """
    full = settings.method == "full"
    config, item = size.config, size.itemsize
    if numbers is None:
        numbers = size.numbers if full else adapter_numbers(config, settings)
    kept = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 1}[settings.optimizer]
    weights = numbers * (item if full else 4)
    gradients = 4 * numbers * (2 if settings.accumulate > 1 else 1)  # of a part, and the sum of those before
    # Full fine-tuning trains the weights themselves, which are counted already.
    training = weights * (kept if full else 1 + kept) + gradients
    schedule = Schedule.of(lengths, settings)
    part = schedule.largest_part(settings.accumulate * ranks, trained)
    layer = item * part.tokens * _layer_numbers(config, settings)
    scores = item * part.scores * config.num_attention_heads
    layer_kept, between = layer + scores, _BETWEEN * item * part.tokens * config.hidden_size
    # The backward pass begins at the output layer, when all layers keep what they need.
    kept_by_layers = config.num_hidden_layers * between
    if not settings.gradient_checkpointing:
        dense = sum(map(config.is_dense, range(config.num_hidden_layers)))
        fewer = layer + item * _sparse_scores(config, part) * config.num_attention_heads
        kept_by_layers += dense * layer_kept + (config.num_hidden_layers - dense) * fewer
    routed = config.experts_per_token > 1
    in_blocks = not fused_attention() and scores > BLOCK * item
    in_work = _WORK * layer + (_AGAIN[routed] * layer if settings.gradient_checkpointing else 0)
    if not fused_attention() and not routed:
        in_work = max(in_work, item * part.tokens * _widest_part(config, settings))
        in_work += (4 - item) // 2 * _NORMS * item * part.tokens * config.hidden_size
    in_work += (_WORK_SCORES[in_blocks] + settings.gradient_checkpointing) * scores
    stack = max(math.prod(shape) for shape in config.linears.values())  # of all experts, which are unpacked together
    rows = part.tokens * config.experts_per_token * config.largest_linear // stack
    if config.quantization is not None and rows >= dequantizing_pays():
        unpacked = _UNPACKED[routed] * stack
        in_work += item * (unpacked if routed else min(unpacked, _SLICES * SLICE))
    logits = _LOGITS * 4 * config.vocab_size * min(part.trained, _PIECES * places_at_once(config.vocab_size))
    work = max(in_work, logits) + _BOTH * min(in_work, logits)
    activations = int(max(kept_by_layers + work, _UPDATE * weights))
    return TrainingPlan(size.weights, training, activations, part.tokens)


def _widest_part(config: Config, settings: Settings) -> int:
    """Numbers of a token while attention, or the feed-forward part, of a layer is in work on the CPU."""
    again = settings.gradient_checkpointing
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return 2 * config.hidden_size + max(
        _QUERIES[again] * queries + _KEYS[again] * keys, _INNER[again] * config.mlp_width
    )


def _sparse_scores(config: Config, part: PartSize) -> int:
    """Attention scores of a head of a block-sparse layer."""
    pattern, length = config.sparse_layers, part.scores // part.tokens
    if pattern is None or length <= pattern.reach:
        return part.scores
    return min(part.scores, part.tokens * (pattern.reach + TILE + length // pattern.stride))


def _layer_numbers(config: Config, settings: Settings) -> int:
    """Activations of one decoder layer for one token that the backward pass needs."""
    hidden, inner = config.hidden_size, config.mlp_width
    heads = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    # Both norms' inputs and outputs, and a sum; queries, keys and values; attention's result; the feed-forward part's.
    numbers = 5 * hidden + (heads + keys) + heads + config.mlp_kept * inner
    if config.experts_per_token > 1:
        # Measured: padded blocks on one side, hidden states that are not kept on the other.
        numbers += inner - 2 * hidden
    adapted = config.adaptable.values()
    if settings.dropout:
        numbers += sum(columns for _, columns in adapted)  # the projections' inputs as the adapters see them
    if settings.method == "dora":
        numbers += sum(rows for rows, _ in adapted)  # the projections' outputs before they are scaled
    return numbers


def training_dtype(settings: Settings) -> str | None:
    """The dtype that the run's model is loaded in."""
    if settings.dtype is None and settings.method == "full":
        return "float32"  # updates of a full fine-tuning are smaller than the steps of 16-bit numbers
    return settings.dtype


def allowed_bytes(settings: Settings, available: int) -> int:
    """Bytes that a run may use: what is `available`, or less if its settings say so."""
    return available if settings.memory is None else min(available, parse_size(settings.memory))


def does_not_fit(needed: TrainingPlan, limit: int, way_out: str) -> MemoryLimitError:
    """The numbers, and what would make the run fit."""
    parts = (("weights", needed.weights), ("training", needed.trained), ("activations", needed.activations))
    return MemoryLimitError(
        f"this run needs about {size_text(needed.total)} ("
        f"{', '.join(f'{name} {size_text(size)}' for name, size in parts)} for {needed.part_tokens:,} tokens at once) "
        f"and {size_text(limit)} may be used; {way_out}; force=True tries all the same"
    )


def find_way_out(settings: Settings, limit: int, replan: Callable[[Settings], TrainingPlan]) -> str:
    """The arguments of the first milder settings that fit; how far they get where none does.

    `replan` gives the plan of changed settings.
    """
    now = settings
    ways: dict[str, str] = {}
    for change in (
        {"gradient_checkpointing": True},
        {"accumulate": max(2, settings.batch_size // 2)},
        {"accumulate": settings.batch_size},
    ):
        name, value = next(iter(change.items()))
        if getattr(now, name) == value or (name == "accumulate" and value > settings.batch_size):
            continue
        now = dataclasses.replace(now, **change)
        ways[name] = f"{name}={value}"
        if replan(now).total <= limit:
            return f"it would fit with {' and '.join(ways.values())}"
    length = now.max_length or 0
    while length > 64:
        length //= 2
        shorter = dataclasses.replace(now, max_length=length)
        if replan(shorter).total <= limit:
            return f"it would fit with {' and '.join([*ways.values(), f'max_length={length}'])}"
    least = replan(dataclasses.replace(now, max_length=64))
    with_what = " and ".join(ways.values()) or "short examples"
    return f"even with {with_what} it needs {size_text(least.total)}; take a 4-bit base or a smaller model"
