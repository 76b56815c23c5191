"""What a prompt can be run with. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from ..engine.lookup import MAX_DRAFT
from ..engine.sampling import Sampling
from ..errors import OptionError
from ..option import Range, option
from ..text.grammar import Form, FormKind, check_form
from ..text.schemas import Schema, schema_text
from ..values import text, texts

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
    choices = tuple(text(value, name).split(",")) if isinstance(value, str) else texts(value, name)
    if not choices or not all(choices):
        raise OptionError(f"{name} has an empty answer to choose; give texts of at least one character")
    return choices


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
    `schema` JSON.

    Raises OptionError for a value of another type or outside its range.
    """

    max_tokens: int = option(256, "Longest answer.", Range(lambda n: n >= 1, "1 or more"))
    stop: str | Sequence[str] | None = option(
        None, "Stop before this text or control token; may be repeated.", read=_stops, metavar="TEXT"
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

    def cache_bits(self) -> KVBits | None:
        """How the cache packs keys and values; None if it does not."""
        from ..models.cache import make_kv_bits

        return make_kv_bits(self.kv_bits, self.kv_group_size)

    def sampling(self) -> Sampling:
        """The options of sampling alone, for the engine, which knows no text."""
        return Sampling(*(getattr(self, field.name) for field in fields(Sampling)))
