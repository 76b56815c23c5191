"""The places of a model that can be read and changed: their names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import OptionError
from ..fields import shorten
from ..generation.loading import check_family, check_loaded
from ..values import listed, whole

if TYPE_CHECKING:
    from ..models.decoder import Model


@dataclass(frozen=True)
class NamedPlace:
    """A place: what is there (`what`), its `shape`, and whether each layer has it and it can be changed.

    B sequences, L tokens, d hidden_size, H query heads, Hkv key heads, D head_dim, n intermediate_size, S tokens read
    so far, V vocab_size, E experts. `heads` says which axis is one of heads, if there is one: "H" or "Hkv".
    """

    name: str
    shape: str
    what: str
    per_layer: bool = True
    changeable: bool = True
    heads: str | None = None

    def itemsize(self, itemsize: int) -> int:
        """Bytes of a number there, in a model that computes in numbers of `itemsize` bytes."""
        return 4 if self.name == "pattern" else itemsize


_STREAM, _BY_QUERY_HEAD, _BY_KEY_HEAD, _WIDE = "(B, L, d)", "(B, L, H, D)", "(B, L, Hkv, D)", "(B, L, n)"
_OF_ALL = (
    NamedPlace("embed", _STREAM, "the embedded tokens, the first layer's input", per_layer=False),
    NamedPlace("resid_pre", _STREAM, "the residual stream before the layer"),
    NamedPlace("attn_in", _STREAM, "what the first norm reads; the stream itself stays as it is"),
    NamedPlace("attn_norm", _STREAM, "what the first norm gives, which attention reads"),
    NamedPlace("q", _BY_QUERY_HEAD, "queries, before rotation", heads="H"),
    NamedPlace("k", _BY_KEY_HEAD, "keys, before rotation", heads="Hkv"),
    NamedPlace("v", _BY_KEY_HEAD, "values", heads="Hkv"),
    NamedPlace(
        "q_rot", _BY_QUERY_HEAD, "rotated queries, with the part of LongRoPE's factor that the scale lacks", heads="H"
    ),
    NamedPlace("k_rot", _BY_KEY_HEAD, "rotated keys", heads="Hkv"),
    NamedPlace(
        "pattern", "(B, H, L, S)", "attention probabilities in float32, 0 for keys that are not seen", heads="H"
    ),
    NamedPlace("z", _BY_QUERY_HEAD, "the values that each head has mixed", heads="H"),
    NamedPlace("head_out", "(B, L, H, d)", "what each head adds to the stream, a bias left out", heads="H"),
    NamedPlace("attn_out", _STREAM, "what attention adds to the stream"),
    NamedPlace("resid_mid", _STREAM, "the residual stream between attention and feed-forward part"),
    NamedPlace("mlp_in", _STREAM, "what the second norm reads; the stream itself stays as it is"),
    NamedPlace("mlp_norm", _STREAM, "what the second norm gives, which the feed-forward part reads"),
    NamedPlace("gate", _WIDE, "the gates of the feed-forward part, before their nonlinearity"),
    NamedPlace("up", _WIDE, "its linear half"),
    NamedPlace("act", _WIDE, "its neurons: what the last matrix reads"),
    NamedPlace("mlp_out", _STREAM, "what the feed-forward part adds to the stream"),
    NamedPlace("resid_post", _STREAM, "the residual stream after the layer"),
    NamedPlace("final_in", _STREAM, "what the last norm reads: the stream after all layers", per_layer=False),
    NamedPlace("final_norm", _STREAM, "what the last norm gives, which logits are made of", per_layer=False),
    NamedPlace("logits", "(B, L, V)", "logits, of the positions of which the run makes them", per_layer=False),
)
_OF_EXPERTS = (
    NamedPlace("router", "(B, L, E)", "the router's scores; their softmax are its probabilities"),
    NamedPlace("experts", "(B, L, 2)", "which experts were chosen, the first before the second"),
    NamedPlace("expert_weights", "(B, L, 2)", "how much each of them counts"),
)
_BLOCKS = NamedPlace(
    "blocks",
    "(H, L / block, L / block)",
    "which blocks of keys each block of queries sees",
    changeable=False,
    heads="H",
)


class Places(dict[str, NamedPlace]):
    """The places of a model by name, in the order in which they are computed; as text, a table with its sizes."""

    def __init__(self, named: Iterable[NamedPlace], config: Config):
        super().__init__((place.name, place) for place in named)
        self._config = config

    def __repr__(self) -> str:
        config = self._config
        sizes = {
            "layers": config.num_hidden_layers,
            "d": config.hidden_size,
            "H": config.num_attention_heads,
            "Hkv": config.num_key_value_heads,
            "D": config.head_dim,
            "n": config.intermediate_size,
            "V": config.vocab_size,
        }
        if "router" in self:
            sizes["E"] = getattr(config, "num_local_experts", 0)
        told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        lines = [f"B sequences, L tokens, S tokens read; {told}"]
        for place in self.values():
            once = "" if place.per_layer else ", once"
            lines.append(f"{place.name:<14}  {place.shape:<15}  {place.what}{once}")
        return "\n".join(lines)


def shortened(indexes: Sequence[int]) -> str:
    """Layers or heads in few characters: "0 to 31", "3", "1, 5"."""
    whole = all(isinstance(index, int) for index in indexes)
    if len(indexes) > 2 and whole and all(after == before + 1 for before, after in pairwise(indexes)):
        return f"{indexes[0]} to {indexes[-1]}"
    return ", ".join(map(str, indexes))


def places(model: Model) -> Places:
    """The places of a model by their names, in the order in which they are computed.

    Raises OptionError for a model of another family.
    """
    check_loaded(model)
    check_family(model, "a trace")
    return places_of(model.config)


def places_of(config: Config) -> Places:
    """`places` of a model with this config."""
    listed = list(_OF_ALL)
    if config.experts_per_token > 1:
        listed = [replace(place, shape="(B, L, 2, n)") if place.shape == _WIDE else place for place in listed]
        before = next(i for i, place in enumerate(listed) if place.name == "gate")
        listed[before:before] = _OF_EXPERTS
    if config.sparse_layers is not None:
        listed.append(_BLOCKS)
    return Places(listed, config)


def place_of(config: Config, name: str) -> NamedPlace:
    """The place of this name. Raises OptionError if there is none."""
    known = places_of(config)
    if name not in known:
        raise OptionError(f"place {shorten(name)} is none of this model; places are {', '.join(known)}")
    return known[name]


def indexes_of(indexes: Iterable[int] | int | None, count: int, what: str) -> list[int]:
    """Layers or heads, negative ones from the end; None: all `count`. Raises OptionError for one that is not there."""
    if indexes is None:
        return list(range(count))
    items = listed(indexes)
    given = [whole(indexes, what)] if items is None else [whole(index, what) for index in items]
    for index in given:
        if not -count <= index < count:
            raise OptionError(f"{what} {index} is not there; the model has {count}")
    meant = [index % count for index in given]
    for i, index in enumerate(meant):
        if index in meant[:i]:
            raise OptionError(f"{what} {index} is given twice")
    return meant


def layers_of(config: Config, place: NamedPlace, layers: Iterable[int] | int | None) -> list[int | None]:
    """The layers that are meant; [None] for a place that is there once."""
    if place.per_layer:
        return list(indexes_of(layers, config.num_hidden_layers, "layer"))
    if layers is not None:
        raise OptionError(f"place {place.name} is in no layer; leave out layers")
    return [None]


def heads_of(config: Config, place: NamedPlace, heads: Iterable[int] | int | None) -> list[int] | None:
    """The heads that are meant, None for all. Raises OptionError where there are none."""
    if heads is None:
        return None
    if place.heads is None:
        raise OptionError(f"place {place.name} has no heads; leave out heads")
    return indexes_of(heads, heads_in(config, place), "head")


def heads_in(config: Config, place: NamedPlace) -> int:
    """How many heads a place has, 1 where it has none."""
    if place.heads is None:
        return 1
    return config.num_attention_heads if place.heads == "H" else config.num_key_value_heads


# How many arrays of a place there are at once, beside what a pass has anyway, while it is changed. What the kernels do
# not write to memory is computed for that alone: there are scores, the value, the new one and their difference. Fitted
# to runs as those of tests/test_inside_memory.py, which took up to 4.9, 2.2 and 0.1.
COMPUTED_BESIDE = ("pattern", "head_out")
_CHANGED = {"pattern": 5, "head_out": 3}
_CHANGED_OTHER = 1


def working_numbers(config: Config, place: NamedPlace, keys: int) -> int:
    """How many numbers of a token there are at once while a place is changed, where there are `keys` keys."""
    return _CHANGED.get(place.name, _CHANGED_OTHER) * numbers_of(config, place, None, keys)


def numbers_of(config: Config, place: NamedPlace, heads: int | None, keys: int) -> int:
    """How many numbers a token has at a place, of that many heads (None: all), where there are `keys` keys."""
    width = {
        "(B, L, d)": config.hidden_size,
        _BY_QUERY_HEAD: config.head_dim,
        _BY_KEY_HEAD: config.head_dim,
        "(B, H, L, S)": keys,
        "(B, L, H, d)": config.hidden_size,
        _WIDE: config.intermediate_size,
        "(B, L, 2, n)": 2 * config.intermediate_size,
        "(B, L, V)": config.vocab_size,
        "(B, L, E)": getattr(config, "num_local_experts", 1),
        "(B, L, 2)": 2,
    }.get(place.shape, 0)
    return width * (heads_in(config, place) if heads is None else heads)
