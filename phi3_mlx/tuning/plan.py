"""How much memory a run will take, computed from config and headers before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.targets import Target, find_targets
from ..config import Config
from ..errors import MemoryLimitError
from ..models.attention import BLOCK, fused_attention
from ..models.blocksparse import TILE
from ..models.linear import SLICE, dequantizing_pays
from ..sizes import parse_size, size_text
from ..store.checkpoint import ModelSize
from .batches import Lengths, PartSize, Schedule
from .loss import places_at_once
from .run_settings import RunSettings, S
from .settings import Settings

# How many copies of an array are alive at once. They are fitted to the peaks of runs on the CPU; behind each stands the
# run that it decides, a case of tests/test_tuning_plan.py. All figures: bench/LOG.md, "One kernel at a time".
_BETWEEN = 4  # hidden states of each layer, which checkpointing keeps too: "deep, checkpointed"
# What the layer in work keeps for the backward pass, and the same again as checkpointing computes it: "wide inside,
# checkpointed" of tests/test_phi_moe_tools.py. A mixture's rows of experts are copied. On the CPU the part of a layer
# that is widest decides a dense model's run instead.
_LAYER = 2.1
_RECOMPUTED, _RECOMPUTED_MIXTURE = 1, 2
_SCORES = 2.5  # attention scores of the layer in work: "wide attention, checkpointed"
_SCORES_IN_BLOCKS, _SCORES_RECOMPUTED = 1.5, 1  # "long, checkpointed"
_LOGITS = 2.1  # of the output layer: "large vocabulary"
_PIECES = 3.5  # of the output layer that are computed at once; no run of these trains as many tokens
_OVERLAP = 0.33  # of the smaller of output layer and layer in work, beside the larger: "checkpointed and accumulated"
_DEQUANTIZED, _SLICES = 3, 4  # of a matrix, but no more than slices of it: "4 bits"; "wide, 4 bits, checkpointed"
# Stacks of experts, which are dequantized whole, as far ahead as MLX allocates: "4 bits, checkpointed" of
# tests/test_phi_moe_tools.py.
_DEQUANTIZED_MIXTURE = 4
# New parameters and what they are computed from, beside gradients and state: "wide, full". Muon multiplies matrices.
_UPDATE, _UPDATE_BY_MUON = 1.25, 1.75
# Numbers of a token in the layer in work on the CPU, where one part of it is much wider than the others: for each of
# its queries and keys, and inside the feed-forward part; with checkpointing, which computes them again, more.
_QUERIES, _KEYS, _INNER = 19, 10, 14  # "wide attention"; "wide inside"
_QUERIES_RECOMPUTED, _KEYS_RECOMPUTED, _INNER_RECOMPUTED = 25, 18, 21  # the same, checkpointed
_TO_COME = 0.5  # of the gradients of layers, in full tuning: "full" of tests/test_preferences.py
# Arrays of a weight's size that each optimizer keeps; adafactor's are a row and a column of each matrix.
_STATES = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
_SMALLER = "take a 4-bit base or a smaller model"
_NORMS = 10  # hidden states in 16 bits, whose room the norms' copies in float32 take: "16 bits, checkpointed"


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
    lengths: Lengths,
    trained: Sequence[int],
    scores: Sequence[int] | None = None,
    *,
    ranks: int = 1,
    numbers: int | None = None,
) -> TrainingPlan:
    """The plan of a run over examples of these lengths (tokens read of each), of which `trained` are trained.

    `scores`: a head's attention scores of each example, if it is more than one sequence.
    `size`: of the model in `training_dtype(settings)`. `numbers`: how many numbers of the model or an adapter are
    trained, if `settings` do not say so.
    """
    if numbers is None:
        numbers = size.numbers if settings.method == "full" else adapter_numbers(size.config, settings)
    part = Schedule.of(lengths, settings).largest_part(settings.accumulate * ranks, trained, scores)
    return plan_part(size, settings, part, numbers)


def plan_part(size: ModelSize, settings: RunSettings, part: PartSize, numbers: int) -> TrainingPlan:
    """The plan of a run whose largest part this is, and which trains this many `numbers`."""
    weights = numbers * (size.itemsize if settings.method == "full" else 4)
    in_work, logits = _layer_in_work(size, settings, part), _output_layer(size.config, part)
    # The backward pass begins at the output layer, when all layers keep what they need.
    work = max(in_work, logits) + _OVERLAP * min(in_work, logits)
    update = weights * (_UPDATE_BY_MUON if settings.optimizer == "muon" else _UPDATE)
    activations = int(max(_kept_by_layers(size, settings, part) + work - _to_come(size, settings, numbers), update))
    return TrainingPlan(size.weights, _training(size, settings, numbers, weights), activations, part.tokens)


def _training(size: ModelSize, settings: RunSettings, numbers: int, weights: int) -> int:
    """Bytes of the trained `weights`, `numbers` in all, with the optimizer's state and gradients in float32."""
    state = weights * _STATES[settings.optimizer]
    gradients = 4 * numbers * (2 if settings.accumulate > 1 else 1)  # of a part, and the sum of those before
    if settings.method != "full":
        return weights + state + gradients
    if settings.optimizer == "muon":
        state += _adamws(size.config, numbers) * size.itemsize
    return state + gradients  # the weights themselves are counted already


def _adamws(config: Config, numbers: int) -> int:
    """How many of the weights AdamW has where Muon has the others: norms, which are few, are left out."""
    return numbers if config.experts_per_token > 1 else _by_vocabulary(config)  # nearly all are in stacks of experts


def _by_vocabulary(config: Config) -> int:
    """How many of the weights are the embedding's and the output layer's."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def _to_come(size: ModelSize, settings: RunSettings, numbers: int) -> float:
    """Bytes of the layers' gradients that are not there yet when the backward pass takes the most.

    A layer's come as what it has kept goes. With checkpointing layers keep little, and the most is at the end.
    """
    if settings.method != "full" or settings.gradient_checkpointing:
        return 0.0
    return _TO_COME * 4 * (numbers - _by_vocabulary(size.config))


def _kept_by_layers(size: ModelSize, settings: RunSettings, part: PartSize) -> int:
    """Bytes that all layers keep from the forward pass for the backward pass."""
    config = size.config
    kept = config.num_hidden_layers * _BETWEEN * size.itemsize * part.tokens * config.hidden_size
    if settings.gradient_checkpointing:
        return kept
    layer = part.tokens * _layer_bytes(size, settings)
    dense = sum(map(config.is_dense, range(config.num_hidden_layers)))
    sparse_scores = size.itemsize * _sparse_scores(config, part) * config.num_attention_heads
    kept += dense * (layer + _scores(size, part))
    return kept + (config.num_hidden_layers - dense) * (layer + sparse_scores)


def _layer_in_work(size: ModelSize, settings: RunSettings, part: PartSize) -> float:
    """Bytes of the layer that the backward pass is in, beside what it keeps."""
    config, recomputes = size.config, settings.gradient_checkpointing
    mixture = config.experts_per_token > 1
    layer, scores = part.tokens * _layer_bytes(size, settings), _scores(size, part)
    in_work: float = _LAYER * layer
    if recomputes:
        in_work += (_RECOMPUTED_MIXTURE if mixture else _RECOMPUTED) * layer
    if not fused_attention() and not mixture:
        in_work = max(in_work, size.itemsize * part.tokens * _widest_part(config, settings))
        if size.itemsize == 2:
            in_work += _NORMS * size.itemsize * part.tokens * config.hidden_size
    in_blocks = not fused_attention() and scores > BLOCK * size.itemsize
    copies = _SCORES_IN_BLOCKS if in_blocks else _SCORES
    in_work += (copies + (_SCORES_RECOMPUTED if recomputes else 0)) * scores
    return in_work + _dequantized(size, part)


def _dequantized(size: ModelSize, part: PartSize) -> int:
    """Bytes of packed weights that are dequantized at once: of a matrix, or of all experts' matrices together."""
    config = size.config
    stack = max(math.prod(shape) for shape in config.linears.values())
    rows = part.tokens * config.experts_per_token * config.largest_linear // stack  # of an expert on average
    if config.quantization is None or rows < dequantizing_pays(size.itemsize, config.largest_linear):
        return 0
    if config.experts_per_token > 1:
        return size.itemsize * _DEQUANTIZED_MIXTURE * stack
    return size.itemsize * min(_DEQUANTIZED * stack, _SLICES * SLICE)


def _output_layer(config: Config, part: PartSize) -> float:
    """Bytes of the logits of the trained tokens, in float32, some pieces at once."""
    tokens = min(part.trained, _PIECES * places_at_once(config.vocab_size))
    return _LOGITS * 4 * config.vocab_size * tokens


def _scores(size: ModelSize, part: PartSize) -> int:
    """Bytes of the attention scores of a dense layer."""
    return size.itemsize * part.scores * size.config.num_attention_heads


def _widest_part(config: Config, settings: RunSettings) -> int:
    """Numbers of a token while attention, or the feed-forward part, of a layer is in work on the CPU."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if settings.gradient_checkpointing:
        attention, inner = _QUERIES_RECOMPUTED * queries + _KEYS_RECOMPUTED * keys, _INNER_RECOMPUTED
    else:
        attention, inner = _QUERIES * queries + _KEYS * keys, _INNER
    return 2 * config.hidden_size + max(attention, inner * config.mlp_width)


def _sparse_scores(config: Config, part: PartSize) -> int:
    """Attention scores of a head of a block-sparse layer."""
    pattern, length = config.sparse_layers, part.scores // part.tokens
    if pattern is None or length <= pattern.reach:
        return part.scores
    return min(part.scores, part.tokens * (pattern.reach + TILE + length // pattern.stride))


def _layer_bytes(size: ModelSize, settings: RunSettings) -> int:
    """Bytes of one decoder layer for one token that the backward pass needs."""
    config = size.config
    hidden, inner = config.hidden_size, config.mlp_width
    heads = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    # Both norms' inputs and outputs, and a sum; queries, keys and values; attention's result; the feed-forward part's.
    numbers = 5 * hidden + (heads + keys) + heads + config.mlp_kept * inner
    if config.experts_per_token > 1:
        # Measured: padded blocks on one side, hidden states that are not kept on the other.
        numbers += inner - 2 * hidden
    if settings.method == "dora":
        numbers += sum(rows for rows, _ in config.adaptable.values())  # the projections' outputs before they are scaled
    return size.itemsize * numbers + (_dropped(config, settings) if settings.dropout else 0)


def _dropped(config: Config, settings: RunSettings) -> int:
    """How many numbers of a token are drawn in a layer, to be kept or dropped: a byte each.

    What is left of a projection's input is kept in the place of all of it.
    """
    if settings.method == "full":
        return 2 * config.hidden_size  # of what attention and feed-forward part add
    return sum(columns for _, columns in config.adaptable.values())


def training_dtype(settings: RunSettings) -> str | None:
    """The dtype that the run's model is loaded in."""
    if settings.dtype is None and settings.method == "full":
        return "float32"  # updates of a full fine-tuning are smaller than the steps of 16-bit numbers
    return settings.dtype


def allowed_bytes(settings: RunSettings, available: int) -> int:
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


def find_way_out(settings: S, limit: int, replan: Callable[[S], TrainingPlan], *, last: str = _SMALLER) -> str:
    """The arguments of the first milder settings that fit; how far they get where none does.

    `replan` gives the plan of changed settings; `last` is what to do where nothing fits.
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
        if replan(_cut_to(now, length)).total <= limit:
            return f"it would fit with {' and '.join([*ways.values(), f'max_length={length}'])}"
    least = replan(_cut_to(now, 64))
    with_what = " and ".join(ways.values()) or "short examples"
    return f"even with {with_what} it needs {size_text(least.total)}; {last}"


def _cut_to(settings: S, length: int) -> S:
    changed: dict[str, Any] = {"max_length": length}
    return dataclasses.replace(settings, **changed)
