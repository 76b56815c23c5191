"""What a prompt can be run with. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from ..engine.lookup import MAX_DRAFT
from ..engine.sampling import Sampling
from ..errors import OptionError
from ..option import Range, option
from ..text.grammar import Form, FormKind, check_form
from ..text.schemas import Schema, schema_text
from ..values import listed, number, refusal, shown, text, texts, whole

if TYPE_CHECKING:
    from ..models.cache import KVBits

CHAT_TOKENS = 1024  # max_tokens of a chat and of the command line, where somebody reads along and can stop an answer
_MOST_LOOKUP = 32  # KVCache.spare: a longer draft could not be taken back from a windowed cache


def _stops(value: Any, name: str) -> tuple[str, ...] | None:
    stops = texts(value, name)
    if not all(stops):
        raise OptionError("a stop string is empty; give at least one character")
    return stops or None


def _choices(value: Any, name: str) -> tuple[str, ...] | None:
    if isinstance(value, str):
        choices = tuple(choice.strip() for choice in text(value, name).split(","))
    else:
        choices = texts(value, name)
    if not choices or not all(choices):
        raise OptionError(f"{name} has an empty answer to choose; give texts of at least one character")
    return choices


def _biases(value: Any, name: str) -> tuple[tuple[int, float], ...] | None:
    """Of a dictionary of ids and numbers, of pairs, or of texts such as "42=-5"."""
    pairs: list[Any] = [*value.items()] if isinstance(value, Mapping) else listed(value) or []
    biases: dict[int, float] = {}
    for pair in pairs:
        if isinstance(pair, str) and re.fullmatch(r"\d{1,9}=.+", pair):
            pair = int(pair.partition("=")[0]), _typed(pair.partition("=")[2])
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise OptionError(f"{name} holds {shown(pair)}; expected a token's id and a number, such as 42=-5")
        token, bias = whole(pair[0], f"an id of {name}"), number(pair[1], f"a number of {name}")
        if token < 0 or not math.isfinite(bias):
            raise OptionError(f"{name} holds {token}={bias}; expected an id of the vocabulary and a finite number")
        biases[token] = bias
    if not pairs and value not in ({}, [], ()):
        raise refusal(value, name, "ids and numbers, such as {42: -5}")
    return tuple(sorted(biases.items())) or None


def _typed(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _key_and_value_bits(value: Any, name: str) -> tuple[int, int]:
    from ..models.cache import make_kv_bits

    bits = make_kv_bits(value)
    assert bits is not None
    return bits.keys, bits.values


@dataclass(frozen=True)
class Request(Sampling):
    """Everything that an answer can be asked for with: the options of sampling, and those below.

    The keyword arguments of `generate` and its kin, the options of the command line and the table in docs/python.md are
    these fields. A `Request` holds values of the fields' types: `stop` and `choices` are tuples, `kv_bits` a pair,
    `logit_bias` pairs, `schema` JSON.

    Raises OptionError for a value of another type or outside its range.
    """

    max_tokens: int = option(256, "Longest answer.", Range(lambda n: n >= 1, "1 or more"))
    stop: str | Sequence[str] | None = option(
        None, "Stop before this text or control token; may be repeated.", read=_stops, metavar="TEXT"
    )
    logit_bias: Mapping[int, float] | Sequence[str] | None = option(
        None,
        "Add BIAS to the logit of the token ID: -100 excludes it; may be repeated.",
        read=_biases,
        metavar="ID=BIAS",
    )
    raw: bool = option(False, "Send the text as it is, without the chat template.")
    kv_bits: int | tuple[int, int] | None = option(
        None,
        "Quantize keys and values to 8, 6, 4, 3 or 2 bits; two numbers (8,4): keys, then values.",
        read=_key_and_value_bits,
    )
    kv_group_size: int | None = option(None, "Quantized numbers that share a scale: 32 or 64.", shown_default="32")
    lookup: int = option(
        MAX_DRAFT,
        "Most tokens to guess from earlier text and verify in one step; 0: none. The text stays the same.",
        Range(lambda n: 0 <= n <= _MOST_LOOKUP, f"0 (off) to {_MOST_LOOKUP}"),
    )
    schema: Schema | None = option(
        None, "Answer in JSON that fits this JSON schema.", read=schema_text, metavar="FILE|JSON"
    )
    regex: str | None = option(None, "Answer with a text that matches this regular expression.", metavar="REGEX")
    grammar: str | None = option(None, "Answer with a text of this grammar, in Lark's form.", metavar="FILE")
    choices: Sequence[str] | str | None = option(
        None, "Answer with one of these texts, which commas separate.", read=_choices, metavar="A,B,C"
    )
    force: bool = option(False, "Go on where there is too little memory.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache_bits()
        if self.form is not None:
            check_form(self.form)

    @property
    def form(self) -> Form | None:
        """What the answer must look like. OptionError where two things say so."""
        given = [kind for kind in get_args(FormKind) if getattr(self, kind) is not None]
        if len(given) > 1:
            raise OptionError(f"{given[0]} has no place beside {given[1]}: an answer follows one alone; leave one out")
        if not given:
            return None
        value = getattr(self, given[0])
        return Form(given[0], value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id; empty without one."""
        return dict(self.logit_bias or ())  # type: ignore[arg-type]

    def cache_bits(self) -> KVBits | None:
        """How the cache packs keys and values; None if it does not."""
        from ..models.cache import make_kv_bits

        return make_kv_bits(self.kv_bits, self.kv_group_size)

    def sampling(self) -> Sampling:
        """The options of sampling alone, for the engine, which knows no text."""
        return Sampling(*(getattr(self, field.name) for field in fields(Sampling)))
