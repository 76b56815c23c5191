"""What a prompt can be run with, and the limits of it."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OptionError
from ..models.cache import KVCache
from ..values import texts, whole

_MOST_LOOKUP = KVCache.spare  # a longer draft could not be taken back from a windowed cache


def check_limits(max_tokens: int, stop: str | Sequence[str] | None, lookup: int = 0) -> tuple[int, list[str], int]:
    """The arguments, typed, the stop strings as a list; OptionError for another type, an empty string, or a number
    outside its range."""
    max_tokens, lookup = whole(max_tokens, "max_tokens"), whole(lookup, "lookup")
    stops = [] if stop is None else list(texts(stop, "stop"))
    if not 0 <= lookup <= _MOST_LOOKUP:
        raise OptionError(f"lookup {lookup} is outside its range; give 0 (off) to {_MOST_LOOKUP}")
    if max_tokens < 1:
        raise OptionError(f"max_tokens {max_tokens} is outside its range; give 1 or more")
    if not all(stops):
        raise OptionError("a stop string is empty; give at least one character")
    return max_tokens, stops, lookup
