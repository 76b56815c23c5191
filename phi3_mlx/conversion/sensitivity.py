"""Bits for every tensor from a measurement: what rounding it does to the model's output, for the bits it takes.

How far rounding one tensor moves the model is measured at the output, as KL divergence: the activations that follow
from it run beside the clean ones to the last layer. That is done at the two smallest widths, whose errors are too large
for any rule. Larger widths follow from the tensor's own output error on the same inputs, because KL grows with the
square of a small error (both halves of that are checked in tests/test_sensitivity.py). Tensors are rounded as the
method will that packs the model: plainly, or by GPTQ (measured.py). Rounding errors of different tensors are nearly
uncorrelated, so their divergences add up, and the best choice for a size is a knapsack.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, OptionError
from ..evaluation.quality import chunks, divergence_from, log_softmax
from ..models.hooks import get_layer
from ..sizes import size_text
from .layerwise import EMBEDDING, LayerStream
from .layout import Layout
from .measured import Columns, Nearest
from .recipes import Recipe, left_alone, uniform
from .sources import Source, to_mlx, weights_of
from .texts import windows

BITS = (2, 3, 4, 5, 6, 8)
SENSITIVITY_WINDOW = 128
TOKENS = 1024  # of the text that are measured
ACTIVATION_BYTES = 1 << 30  # fewer tokens where the activations of all tensors would take more
_STEPS = 100_000  # of the knapsack
_MEASURED = 2  # widths of each tensor

Costs = dict[str, dict[int, float]]  # tensor name -> bits -> KL divergence in nats
Sizes = dict[str, dict[int, int]]  # tensor name -> bits -> bytes


def choose_recipe(
    source: Source,
    *,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
    group_size: int = 64,
    ids: Sequence[int],
    bits: Sequence[int] = BITS,
    rounds: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Recipe:
    """The recipe of least estimated KL divergence whose tensors take at most the target.

    The target is `target_bytes`, or `target_bpw` bits for each of the model's weights, scales and norms included.
    `ids`: the token ids of a text like those that the model will read; about a thousand are used. `progress` counts
    layers, each measured at two widths. A fused `qkv_proj` or `gate_up_proj` is one tensor of one width, as the format
    demands, and is measured with all its rows rounded. With `rounds` GPTQ rounds them, fitted to about four thousand
    other tokens of the text, so that the bits are best for it.

    Memory: one layer in float32, and the activations of one row of the text for every tensor of the model, or about
    a gigabyte of them if that is more; with `rounds` what GPTQ takes for a matrix. Raises OptionError for a target
    that no choice of bits meets, PromptError for a text that is too short, CheckpointError for a model whose outputs
    are not finite.
    """
    sizes, fixed = sizes_of(source, group_size, bits)
    budget = _budget(source, sizes, fixed, target_bpw, target_bytes, group_size)
    costs = measure(source, ids, group_size=group_size, bits=bits, rounds=rounds, progress=progress)
    return as_recipe(allocate(costs, sizes, budget - fixed), sizes, group_size) | left_alone(source.config)


def sizes_of(source: Source, group_size: int, bits: Sequence[int]) -> tuple[Sizes, int]:
    """Bytes of every tensor that can be packed at each width, and the bytes of the others together."""
    sizes: Sizes = {}
    fixed = 0
    for width in bits:
        layout = Layout.of(source, uniform(width, group_size) | left_alone(source.config))
        for entry in layout.entries:
            if entry.packing is not None:
                sizes.setdefault(entry.name, {})[width] = entry.nbytes
        fixed = sum(entry.nbytes for entry in layout.entries if entry.packing is None)
    return sizes, fixed


def _budget(
    source: Source, sizes: Sizes, fixed: int, target_bpw: float | None, target_bytes: int | None, group_size: int
) -> int:
    """The target in bytes. OptionError where there is not one target, or no choice of bits meets it."""
    if (target_bpw is None) == (target_bytes is None):
        raise OptionError("one target is needed, target_bpw or target_bytes; give one of them")
    weights = weights_of(source)
    if target_bytes is None:
        assert target_bpw is not None
        if not math.isfinite(target_bpw):
            raise OptionError(f"target {target_bpw} is not a number of bits; give something like 4.5")
        target_bytes, asked = math.floor(target_bpw * weights / 8 + 1e-6), f"{target_bpw:g} bits per weight"
    else:
        asked = size_text(target_bytes)
    ends = {width: fixed + sum(by_width[width] for by_width in sizes.values()) for width in _widths(sizes)}
    (least, smallest), (most, largest) = min(ends.items()), max(ends.items())

    def size(width: int, total: int) -> str:
        return f"{width} bits everywhere take {8 * total / weights:.3f} bits per weight ({size_text(total)})"

    if target_bytes < smallest:
        hint = "" if group_size >= 128 or target_bytes <= 0 else ", or larger groups (group_size=128)"
        raise OptionError(f"a target of {asked} is too small: {size(least, smallest)}; give more{hint}")
    if target_bytes > largest:
        raise OptionError(f"a target of {asked} is too large: {size(most, largest)}; use bits={most} or give less")
    return target_bytes


def measure(
    source: Source,
    ids: Sequence[int],
    *,
    group_size: int = 64,
    bits: Sequence[int] = BITS,
    rounds: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """The estimated KL divergence of the model's output, in nats, when one tensor alone is rounded to each width.

    `rounds`: by GPTQ.
    """
    return _Measurement(source, ids, group_size, sorted(bits), rounds).run(progress)


class _Measurement:
    def __init__(self, source: Source, ids: Sequence[int], group_size: int, bits: Sequence[int], rounds: bool):
        self._source, self._stream, self._bits = source, LayerStream(source), bits
        self._rounding = Columns(self._stream) if rounds else Nearest()
        recipe = uniform(bits[0], group_size) | left_alone(source.config)
        self._packings = Layout.of(source, recipe).packings
        row = len(self._packings) * SENSITIVITY_WINDOW * self._stream.config.hidden_size * 4
        rows = max(1, min(TOKENS // SENSITIVITY_WINDOW, ACTIVATION_BYTES // row))
        self._ids = self._rounding.measured(windows(ids, SENSITIVITY_WINDOW), rows)
        self._errors: Costs = {}  # squared output error of each tensor at each width
        self._compared = False  # whether that is complete
        self._clean = mx.array(0.0)
        self._moved: dict[str, mx.array] = {}  # the activations that follow from rounding one tensor

    def run(self, progress: Callable[[int, int], None] | None) -> Costs:
        measured, layers = self._bits[:_MEASURED], self._stream.config.num_hidden_layers
        divergences = {}
        for i, width in enumerate(measured):  # one after the other: the activations of all tensors are large
            first, total = i * layers, len(measured) * layers
            divergences[width] = self._divergences(width, first, total, progress)
        costs: Costs = {}
        for name, errors in self._errors.items():
            anchor = _anchor(errors, measured)
            at = divergences[anchor][name] / errors[anchor] if errors[anchor] else 0.0
            costs[name] = {width: at * error for width, error in errors.items()}
            costs[name] |= {width: divergences[width][name] for width in measured}
        return costs

    def _divergences(
        self, width: int, done: int, total: int, progress: Callable[[int, int], None] | None
    ) -> dict[str, float]:
        """Mean KL divergence of the outputs with each tensor alone rounded to `width`, in nats."""
        self._moved = {}
        self._rounding.begin()
        self._embedding(width)
        for i in range(self._stream.config.num_hidden_layers):
            if progress is not None:
                progress(done + i, total)
            self._layer(i, width)
            mx.clear_cache()
        divergences = self._at_the_output(width)
        self._compared = True
        if progress is not None:
            progress(done + self._stream.config.num_hidden_layers, total)
        for name, divergence in divergences.items():
            if not math.isfinite(divergence):
                raise CheckpointError(
                    f"{self._source.name}: outputs are not finite with {name} rounded, so no bits can be chosen; "
                    "choose them with bits or recipe"
                )
        return divergences

    def _embedding(self, width: int) -> None:
        name = f"{EMBEDDING}.weight"
        rows = self._source.read(name)[self._ids.flatten()]
        shape = (*self._ids.shape, -1)
        self._clean = self._stream.embedded(rows.reshape(shape))
        if name in self._packings:
            self._compare(name, rows.astype(mx.float32))
            self._moved[name] = self._stream.embedded(self._rounded(name, rows, width).reshape(shape))

    def _layer(self, i: int, width: int) -> None:
        layer = self._stream.layer(i)
        for name, hidden in self._moved.items():
            self._moved[name] = self._stream.run(layer, hidden)
        traced = list(self._stream.trace(layer, self._clean))
        for path in self._stream.linears:
            name, module = f"model.layers.{i}.{path}.weight", get_layer(layer, path)
            if name not in self._packings:
                continue
            weight = module.weight
            self._rounding.matrix(layer, path)
            by_matrix = zip(*(inputs[path] for inputs, _ in traced), strict=True)
            self._compare(name, weight, [mx.concatenate(list(parts)) for parts in by_matrix])
            module.weight = self._rounded(name, weight, width)
            self._moved[name] = self._stream.run(layer, self._clean)
            module.weight = weight
        self._clean = mx.concatenate([after for _, after in traced])
        self._rounding.past(layer)

    def _at_the_output(self, width: int) -> dict[str, float]:
        """Mean KL divergence of each tensor's activations, and of the head's own rounding."""
        name = f"{self._stream.head_path}.weight"
        weight = self._source.read(name).astype(mx.float32)
        hidden = self._stream.norm(self._clean).flatten(0, 1)
        head = weight
        if name in self._packings:
            self._rounding.head()
            self._compare(name, weight, [hidden])
            head = self._rounded(name, weight, width)
            self._moved.setdefault(name, self._clean)
        sums = dict.fromkeys(self._moved, 0.0)
        for here in chunks(len(hidden), len(weight)):
            clean = log_softmax(self._stream.logits(hidden[here], weight))
            likely = np.exp(clean)
            for moved, states in self._moved.items():
                normed = self._stream.norm(states.flatten(0, 1)[here])
                logits = self._stream.logits(normed, head if moved == name else weight)
                sums[moved] += float(divergence_from(clean, likely, logits).sum(dtype=np.float64))
        return {moved: max(total / len(hidden), 0.0) for moved, total in sums.items()}

    def _compare(self, name: str, weight: mx.array, inputs: Sequence[mx.array] | None = None) -> None:
        """Keep the squared error of the outputs at each width; without `inputs`, that of the weight.

        `inputs` has one array (tokens, width) for each matrix of `weight`.
        """
        if self._compared:
            return
        self._errors[name] = {}
        some = self._rounding.sample(weight)
        for width in self._bits:
            error = self._rounded(name, some, width) - some
            if inputs is None:
                total = (error**2).sum()
            else:
                changes = [error] if error.ndim == 2 else list(error)
                total = mx.array(0.0)
                for x, change in zip(inputs, changes, strict=True):
                    total = total + ((x @ change.T) ** 2).sum()
            self._errors[name][width] = float(total)

    def _rounded(self, name: str, weight: mx.array, width: int) -> mx.array:
        packing = {**self._packings[name], "bits": width}
        return self._rounding.rounded(weight, packing, to_mlx(self._source.tensors[name].dtype))


def _anchor(errors: Mapping[int, float], measured: Sequence[int]) -> int:
    """The measured width that larger ones are extrapolated from: the largest.

    A lower one where the source lies on that width's own grid already, having been packed with it.
    """
    least = measured[0]
    return next((width for width in reversed(measured) if errors[width] > 1e-3 * errors[least]), least)


def allocate(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """The widths of least total cost whose bytes fit in `budget`; the smallest widths must fit.

    An exact knapsack where the sizes' common divisor is coarse enough, else one in steps of a 100,000th.
    """
    least = {name: min(by_width.values()) for name, by_width in sizes.items()}
    spare = budget - sum(least.values())
    unit = math.gcd(*(size - least[name] for name, by_width in sizes.items() for size in by_width.values()))
    unit = max(unit, -(-spare // _STEPS), 1)
    best = np.zeros(spare // unit + 1)
    chosen = []
    for name, by_width in sizes.items():
        widths = sorted(by_width)
        sums = np.full((len(widths), len(best)), np.inf)
        for i, width in enumerate(widths):
            steps = -(-(by_width[width] - least[name]) // unit)
            if steps < len(best):
                sums[i, steps:] = best[: len(best) - steps] + costs[name][width]
        chosen.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    at, result = len(best) - 1, {}
    for (name, by_width), choice in zip(reversed(list(sizes.items())), reversed(chosen), strict=True):
        width = sorted(by_width)[choice[at]]
        result[name] = width
        at -= -(-(by_width[width] - least[name]) // unit)
    return {name: result[name] for name in sizes}


def as_recipe(chosen: Mapping[str, int], sizes: Mapping[str, Mapping[int, int]], group_size: int) -> Recipe:
    """The recipe of these widths: the default is that of most bytes, and each tensor that differs has an entry."""
    share: Counter[int] = Counter()
    for name, width in chosen.items():
        share[width] += sizes[name][width]
    usual = share.most_common(1)[0][0]
    recipe: Recipe = uniform(usual, group_size)
    for name, width in chosen.items():
        if width != usual:
            recipe[name.removesuffix(".weight")] = uniform(width, group_size)
    return recipe


def _widths(sizes: Sizes) -> list[int]:
    return sorted(next(iter(sizes.values())))
