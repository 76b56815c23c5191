"""Which layers an adapter changes: Phi-3's names for them, the parts of the fused ones, ranges of decoder layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Phi3Config
from ..errors import OptionError

HOME = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", *PARTS["qkv_proj"], *PARTS["gate_up_proj"])
ALL = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt. `parts` are the names and output rows to adapt apart; one part is the whole layer."""

    path: str  # "model.layers.3.self_attn.qkv_proj"
    name: str  # "qkv_proj"
    rows: int  # outputs of the layer
    columns: int  # its inputs
    parts: tuple[tuple[str, int, int], ...]  # (name, first row, past the last row)


def part_rows(config: Phi3Config, name: str) -> dict[str, tuple[int, int]]:
    """The parts of a fused layer and their output rows, (first, past the last); the whole layer if it is not fused."""
    if name == "qkv_proj":
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    if name == "gate_up_proj":
        return {
            "gate_proj": (0, config.intermediate_size),
            "up_proj": (config.intermediate_size, 2 * config.intermediate_size),
        }
    return {name: (0, shape(config, name)[0])}


def shape(config: Phi3Config, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a layer of that name."""
    attention = config.num_attention_heads * config.head_dim
    return {
        "qkv_proj": (attention + 2 * config.num_key_value_heads * config.head_dim, config.hidden_size),
        "o_proj": (config.hidden_size, attention),
        "gate_up_proj": (2 * config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }[name]


def find_targets(config: Phi3Config, names: Sequence[str] = ALL, layers: str | None = None) -> list[Target]:
    """The layers that `names` and `layers` (see `layer_range`) choose, in model order. Raises OptionError.

    A name is a layer's (`qkv_proj`) or that of a part of a fused one (`q_proj`), which is then adapted apart.
    """
    if not names:
        raise OptionError(f"no layer is named to adapt; choose of {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            raise OptionError(f"target {name!r} matches no layer; choose of {', '.join(NAMES)}")
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for name in ALL:
        parts = tuple(part for part in PARTS.get(name, ()) if part in names)
        if name in names and parts:
            raise OptionError(f"target {parts[0]!r} is a part of {name!r}, which is named too; leave one of them out")
        if name in names or parts:
            chosen.append((name, parts))
    found = []
    for layer in layer_range(layers, config.num_hidden_layers):
        for name, parts in chosen:
            rows, columns = shape(config, name)
            spans = part_rows(config, name)
            cut = tuple((part, *spans[part]) for part in parts) or ((name, 0, rows),)
            found.append(Target(f"model.layers.{layer}.{HOME[name]}.{name}", name, rows, columns, cut))
    return found


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
