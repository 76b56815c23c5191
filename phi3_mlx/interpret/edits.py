"""Changes of a model's values: a function, a value of another run, a constant, an added vector, a head that is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..values import number, plain, refusal, shown, whole
from .keeping import Inside, of_keys
from .selecting import HeadIndexes, Here, LayerIndexes, Positions, Tokens, When
from .table import shortened


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change of the values at a place: make one with `change`, `patch`, `steer` or `switch_off`.

    `function(x, here)` gives the new value for x, the place's value at the chosen positions and heads; `what` says in
    short what that is.
    """

    place: str
    function: Callable[[mx.array, Here], mx.array]
    what: str
    layers: LayerIndexes = None
    heads: HeadIndexes = None
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def by_prompt(self) -> bool:
        """Whether it depends on where the prompt ends, what it changes."""
        return self.tokens.by_prompt

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            indexes = plain(getattr(self, name))
            several = indexes is not None and not isinstance(indexes, int)
            object.__setattr__(self, name, tuple(indexes) if several else indexes)  # a generator would be used up

    def __repr__(self) -> str:
        where = ""
        for name, indexes in (("layers", self.layers), ("heads", self.heads)):
            if indexes is not None:
                where += f", {name} {indexes if isinstance(indexes, int) else shortened([*indexes])}"
        return f"<Edit: {self.place}{self.tokens} {self.what}{where}>"


def change(
    place: str,
    function: Callable[[mx.array], mx.array],
    *,
    layers: LayerIndexes = None,
    heads: HeadIndexes = None,
    positions: Positions = None,
    when: When = "always",
) -> Edit:
    """Replace the values x at a place by `function(x)`, of the same shape.

    x has the place's shape with the chosen positions and heads alone, and of the tokens that one pass reads.
    `layers` and `heads`: None for all. `positions`: None for all, else whole numbers or a slice; negative ones count
    from the prompt's end. `when`: "always", "prefill" (the prompt's tokens) or "decode" (those generated).
    """
    if not callable(function):
        raise refusal(function, "function", "a function of an array")
    name = getattr(function, "__name__", type(function).__name__)
    return Edit(place, lambda x, _: function(x), f"changed by {name}", layers, heads, Tokens(positions, when))


def patch(
    place: str,
    value: Inside | mx.array | float,
    *,
    layers: LayerIndexes = None,
    heads: HeadIndexes = None,
    positions: Positions = None,
    when: When = "always",
) -> Edit:
    """Replace the values at a place by others: of another run (an `Inside` that kept them), an array, or a number.

    Of an `Inside` those of the same layer, positions and heads are taken, of its one row or of the same row. An array
    is (B or 1, positions or 1, ...), where `positions` counts those that are chosen, or has fewer axes and is for
    each of them.
    """
    tokens = Tokens(positions, when)
    value = _of_mlx(value)
    if isinstance(value, int | float):
        return Edit(place, lambda x, _: mx.full(x.shape, value, x.dtype), f"= {shown(value)}", layers, heads, tokens)
    if isinstance(value, mx.array):
        part = f"= array {value.shape}"
        return Edit(place, lambda x, here: _part_of(value, x, here, place), part, layers, heads, tokens)
    if not isinstance(value, Inside):
        raise refusal(value, "value", "what inspect() or trace() kept, an array of MLX or numpy, or a number")

    def of_run(x: mx.array, here: Here) -> mx.array:
        taken = value.taken(place, here)
        return _broadcast(of_keys(taken, x.shape[-1]) if place == "pattern" else taken, x, place)

    return Edit(place, of_run, "= another run's", layers, heads, tokens)


def steer(
    vector: mx.array | Mapping[int, mx.array],
    *,
    layers: LayerIndexes = None,
    strength: float = 1.0,
    place: str = "resid_post",
    positions: Positions = None,
    when: When = "always",
) -> Edit:
    """Add `strength` times a vector to the values at a place: (width,) for all layers, or one for each it names.

    A dictionary is what `steering_vectors` and `load_steering` give.
    """
    if not isinstance(strength, mx.array):
        strength = number(strength, "strength")
        if not math.isfinite(strength):
            raise refusal(strength, "strength", "a finite number")
    by_layer = isinstance(vector, Mapping)
    given: Mapping[Any, object] = vector if isinstance(vector, Mapping) else {None: vector}
    vectors: dict[int | None, mx.array] = {}
    for layer, each in given.items():
        array = _of_mlx(each)
        if not isinstance(array, mx.array):
            raise refusal(each, "vector", "an array of MLX or numpy, or a dictionary of one for each layer")
        vectors[layer] = array
        if layer is not None and whole(layer, "layer") < 0:
            raise OptionError(f"layer {layer} of a dictionary of vectors; count layers from 0 there")
    if by_layer and layers is not None:
        raise OptionError("layers are given, and vectors for each layer; leave out layers")

    def added(x: mx.array, here: Here) -> mx.array:
        each = vectors[here.layer if by_layer else None]
        if each.shape[-1:] != x.shape[-1:]:
            raise OptionError(f"a vector of shape {each.shape} cannot be added at {place}, which is {x.shape[-1]} wide")
        return x + strength * each

    times = "array" if isinstance(strength, mx.array) else f"{strength:g}"
    what = f"+ {times} x {next(iter(vectors.values())).shape if vectors else 'nothing'}"
    return Edit(place, added, what, [*vector] if isinstance(vector, Mapping) else layers, None, Tokens(positions, when))


def switch_off(layer: int, heads: HeadIndexes, *, positions: Positions = None, when: When = "always") -> Edit:
    """Let heads of a layer give 0."""
    return patch("z", 0.0, layers=layer, heads=heads, positions=positions, when=when)


def _of_mlx(value: Any) -> Any:
    """Arrays of numpy as MLX's, and scalars of either as Python's numbers; anything else as it is."""
    if isinstance(value, mx.array):
        return value
    return mx.array(value) if isinstance(value, np.ndarray) else plain(value)


def _part_of(value: mx.array, x: mx.array, here: Here, place: str) -> mx.array:
    """Of an array for all rows and positions that are meant, those that are here."""
    value = value.reshape(*[1] * (x.ndim - value.ndim), *value.shape)
    if value.ndim == x.ndim:
        if place == "pattern" and value.shape[-1] > x.shape[-1]:
            value = of_keys(value, x.shape[-1])
        axis = 2 if place == "pattern" else 1
        if value.shape[axis] != 1:
            value = mx.take(value, _within(here.ordinals, value.shape[axis], "positions"), axis)
        if value.shape[0] != 1:
            value = value[_within(here.rows, value.shape[0], "rows")]
    return _broadcast(value, x, place)


def _broadcast(value: mx.array, x: mx.array, place: str) -> mx.array:
    try:
        return mx.broadcast_to(value, x.shape)
    except ValueError:
        raise OptionError(f"a patch of {place} is {value.shape}, which does not fit values of {x.shape}") from None


def _within(indexes: Sequence[int], count: int, what: str) -> mx.array:
    if max(indexes) >= count:
        raise OptionError(f"the array of a patch has {count} {what}, and number {max(indexes)} (from 0) is asked for")
    return mx.array([*indexes])
