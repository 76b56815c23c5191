"""A decoding step that costs the host little: one token of each of some sequences, perhaps of several.

Python that calls a layer's modules, and MLX that takes up their operations one by one, last longer than the arithmetic
of a small model. So what a layer does before and behind attention is compiled, as two functions of its arrays. They
are made from the layer's own modules, so no formula is written twice, and the plain path (`decoder`) is the oracle.

Arrays are looked up at every step, so weights may be loaded or change their type at any time. A layer is compiled anew
once one of its modules was exchanged, as quantization and adapters do. The plain path takes those that have a module
which is not known to be a function of its arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import KVCache
from .experts import QuantizedSwitchLinear, SwitchLinear
from .layer import DecoderLayer
from .linear import Linear, QuantizedLinear
from .rope import Rope
from .slots import Unit

# Modules whose call is a function of their arrays, their packing and their input.
_PURE = (Linear, QuantizedLinear, SwitchLinear, QuantizedSwitchLinear, nn.RMSNorm, nn.LayerNorm)
_PACKING = ("group_size", "bits", "mode")

Arrays = dict[str, Any]  # a layer's: a module is a dict of arrays and other modules


@dataclass(frozen=True)
class _Halves:
    """What a kind of layer does around attention.

    `before(layer, x, turns)`: rotated queries, rotated keys and values (rows, heads, 1, D);
    `behind(layer, x, mixed)`: the layer's output, where `mixed` has the outputs of attention, of some rows each.
    x and the output are (rows, hidden_size).
    """

    before: Callable[[Arrays, mx.array, list[mx.array]], list[mx.array]]
    behind: Callable[[Arrays, mx.array, list[mx.array]], mx.array]


@dataclass(frozen=True)
class _Known:
    """A layer that was looked at: its modules, each as (parent, name, module), and its halves if it has them."""

    layer: DecoderLayer
    modules: tuple[tuple[nn.Module, str, nn.Module], ...]
    halves: _Halves | None

    def is_still(self, layer: DecoderLayer) -> bool:
        """Whether no module was exchanged."""
        return layer is self.layer and all(parent.get(name) is module for parent, name, module in self.modules)


class Steps:
    """The compiled layers of a decoder."""

    def __init__(self, rope: Rope):
        self._rope = rope
        self._known: dict[int, _Known] = {}  # by the layer's index
        self._kinds: dict[tuple[Any, ...], _Halves] = {}  # layers of one kind share what is compiled

    def __reduce__(self) -> tuple[type[Steps], tuple[Rope]]:
        return Steps, (self._rope,)  # a copy of the model compiles its own layers

    def begin(
        self,
        layers: Sequence[DecoderLayer],
        caches: Sequence[list[KVCache]],
        units: Sequence[Unit],
        long: tuple[bool, ...],
    ) -> CompiledStep | None:
        """A step of the sequences with these caches, in these units and regimes; None where it takes the plain path."""
        if any(cache[0].sequence.left_padding is not None for cache in caches) or layers[0].waits(len(caches)):
            return None
        halves: list[_Halves] = []
        for index, layer in enumerate(layers):
            known = self._known.get(index)
            if known is None or not known.is_still(layer):
                known = self._known[index] = self._look_at(layer)
            if known.halves is None:
                return None
            halves.append(known.halves)
        turns = self._rope.turns([cache[0].offset for cache in caches], long)
        return None if turns is None else CompiledStep(halves, units, turns)

    def _look_at(self, layer: DecoderLayer) -> _Known:
        modules = tuple(_modules_in(layer))
        if not _is_pure(layer) or not all(_is_pure(module) for _, _, module in modules):
            return _Known(layer, modules, None)
        kind = (type(layer), *((name, type(module), _packing(module)) for _, name, module in modules))
        if kind not in self._kinds:
            self._kinds[kind] = _compiled(_without_arrays(layer), self._rope)
        return _Known(layer, modules, self._kinds[kind])


class CompiledStep:
    """One more token of each of some sequences, which are attended to in these units, layer after layer."""

    def __init__(self, halves: list[_Halves], units: Sequence[Unit], turns: list[mx.array]):
        self._layers, self._units, self._turns = enumerate(halves), units, turns

    def forward(self, layer: DecoderLayer, x: mx.array) -> mx.array:
        """The next layer's output (rows, hidden_size) for x of the same shape."""
        index, halves = next(self._layers)
        q, k, v = halves.before(layer, x, self._turns)
        return halves.behind(layer, x, layer.self_attn.attend_each(q, k, v, self._units, index))


def _compiled(template: DecoderLayer, rope: Rope) -> _Halves:
    """The halves of layers like `template`, which has no arrays. They are traced when they meet another shape."""

    def before(arrays: Arrays, x: mx.array, turns: list[mx.array]) -> list[mx.array]:
        layer = _with_arrays(template, arrays)
        qkv = layer.self_attn.qkv(layer.input_layernorm(x))
        q, k, v = layer.self_attn.split(qkv[:, None], lambda part: rope.turned(part, turns))
        return [rope.gained(q, turns), k, v]

    def behind(arrays: Arrays, x: mx.array, mixed: list[mx.array]) -> mx.array:
        layer = _with_arrays(template, arrays)
        joined = mixed[0] if len(mixed) == 1 else mx.concatenate(mixed)
        x = x + layer.self_attn.output(joined.reshape(len(x), -1))
        return x + layer.feed_forward(layer.post_attention_layernorm(x))

    return _Halves(mx.compile(before), mx.compile(behind))


def _modules_in(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """All modules in a module, each with its parent and its name in it."""
    for name, child in parent.items():
        if isinstance(child, nn.Module):
            yield parent, name, child
            yield from _modules_in(child)


def _is_pure(module: nn.Module) -> bool:
    """Whether a module's call is known to be a function of arrays: MLX's, or this package's around such."""
    if type(module) in _PURE:
        return True
    return type(module).__module__.startswith(f"{__package__}.") and all(
        isinstance(child, nn.Module) for child in module.values()
    )


def _packing(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, name) for name in _PACKING) if "scales" in module else ()


def _without_arrays(module: Any) -> Any:
    """A copy of a module, and of those in it, that keeps no array alive."""
    bare = copy.copy(module)
    for name, child in module.items():
        dict.__setitem__(bare, name, _without_arrays(child) if isinstance(child, nn.Module) else None)
    return bare


def _with_arrays(template: Any, arrays: Arrays) -> Any:
    """A module like `template` with these arrays, which nobody else sees."""
    module = copy.copy(template)
    for name, value in arrays.items():
        dict.__setitem__(module, name, _with_arrays(template[name], value) if isinstance(value, dict) else value)
    return module
