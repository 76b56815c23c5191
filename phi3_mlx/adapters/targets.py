"""Which layers an adapter changes: by name, by part of a fused layer (q_proj of qkv_proj), by range of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import OptionError


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt. Each of its `parts` gets components of its own; usually the whole layer is one part."""

    path: str  # "model.layers.3.self_attn.qkv_proj"
    name: str  # "qkv_proj"
    rows: int  # outputs of the layer
    columns: int  # its inputs
    parts: tuple[tuple[str, int, int], ...]  # (name, first row, past the last row)


def names_of(config: Config) -> list[str]:
    """All names that a user may choose: a decoder layer's adaptable layers, then the parts of the fused ones."""
    return [*map(_name, config.adaptable), *(part for parts in config.parts.values() for part in parts)]


def part_rows(config: Config, name: str) -> dict[str, tuple[int, int]]:
    """The parts of a fused layer with their output rows, (first, past the last); the whole layer if it is not fused."""
    return config.parts.get(name) or {name: (0, shape(config, name)[0])}


def path_of(config: Config, name: str) -> str | None:
    """The path in a decoder layer ("self_attn.qkv_proj") of the linear layer that has this name or a part of it."""
    return next(
        (path for path in config.adaptable if name == _name(path) or name in config.parts.get(_name(path), ())), None
    )


def shape(config: Config, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a layer of that name."""
    return next(shape for path, shape in config.adaptable.items() if _name(path) == name)


def find_targets(config: Config, names: Sequence[str] = (), layers: str | None = None) -> list[Target]:
    """The layers that `names` (none: all) and `layers` (see `layer_range`) choose, in model order. Raises OptionError.

    A name is that of a layer (`qkv_proj`) or of a part of a fused layer (`q_proj`), which then has its own components.
    """
    known = names_of(config)
    for name in names:
        if name not in known:
            raise OptionError(f"target {name!r} matches no layer; choose of {', '.join(known)}")
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for path in config.adaptable:
        name = _name(path)
        parts = tuple(part for part in config.parts.get(name, ()) if part in names)
        if name in names and parts:
            raise OptionError(f"target {parts[0]!r} is a part of {name!r}, which is named too; leave one of them out")
        if not names or name in names or parts:
            chosen.append((path, parts))
    targets = []
    for layer in layer_range(layers, config.num_hidden_layers):
        for path, parts in chosen:
            rows, columns = config.adaptable[path]
            name = _name(path)
            spans = part_rows(config, name)
            cut = tuple((part, *spans[part]) for part in parts) or ((name, 0, rows),)
            targets.append(Target(f"model.layers.{layer}.{path}", name, rows, columns, cut))
    return targets


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def layer_range(given: str | None, count: int) -> range:
    """Decoder layers of a model with `count`: "8-15", "8-" (to the last), "-8" (the last eight), "3"; None is all."""
    if given is None:
        return range(count)
    match = re.fullmatch(r"\s*(\d+)?\s*(-)?\s*(\d+)?\s*", given)
    if match is None or match[1] is None is match[3]:
        raise OptionError(f"layers {given!r} is no range; write 8-15, 8- (to the last), -8 (the last eight) or 3")
    first, dash, last = match.groups()
    if first is None:
        chosen = range(count - int(last), count)
    else:
        chosen = range(int(first), (int(last) if last else count - 1 if dash else int(first)) + 1)
    if not chosen or chosen.start < 0 or chosen.stop > count:
        raise OptionError(f"layers {given!r} is outside this model, whose {count} layers are 0-{count - 1}")
    return chosen
