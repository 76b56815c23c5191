"""What a prompt can be run with. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..engine.lookup import MAX_DRAFT
from ..engine.sampling import Sampling
from ..errors import OptionError
from ..option import Range, option
from ..values import texts

if TYPE_CHECKING:
    from ..models.cache import KVBits

CHAT_TOKENS = 1024  # max_tokens of a chat and of the command line, where somebody reads along and can stop an answer
_MOST_LOOKUP = 32  # KVCache.spare: a longer draft could not be taken back from a windowed cache


def _stops(value: Any, name: str) -> tuple[str, ...] | None:
    stops = texts(value, name)
    if not all(stops):
        raise OptionError("a stop string is empty; give at least one character")
    return stops or None


def _key_and_value_bits(value: Any, name: str) -> tuple[int, int]:
    from ..models.cache import make_kv_bits

    bits = make_kv_bits(value)
    assert bits is not None
    return bits.keys, bits.values


@dataclass(frozen=True)
class Request(Sampling):
    """Everything that an answer can be asked for with: the options of sampling, and those below.

    The keyword arguments of `generate` and its kin, the options of the command line and the table in docs/python.md are
    these fields. A `Request` holds values of the fields' types: `stop` is a tuple, `kv_bits` a pair.

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
    force: bool = option(False, "Go on where there is too little memory.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache_bits()

    def cache_bits(self) -> KVBits | None:
        """How the cache packs keys and values; None if it does not."""
        from ..models.cache import make_kv_bits

        return make_kv_bits(self.kv_bits, self.kv_group_size)

    def sampling(self) -> Sampling:
        """The options of sampling alone, for the engine, which knows no text."""
        return Sampling(*(getattr(self, field.name) for field in fields(Sampling)))
