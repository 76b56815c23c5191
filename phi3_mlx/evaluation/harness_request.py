"""What a task of lm-eval asks an answer with, as a request of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..generation.request import Request

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What tasks say of searches and backends that we have not, with the value that changes nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}


def harness_request(given: Mapping[str, Any], *, max_tokens: int, seed: int | None = None) -> Request:
    """What a task of lm-eval asks an answer with (`generation_kwargs`) as a request of ours.

    `max_tokens` is the longest answer of a task that names none. Without `do_sample` a temperature above 0 draws.
    Raises OptionError for a key that would change the answers and has no meaning here.
    """
    options = {key: value for key, value in given.items() if value is not None}
    lengths = [options.pop(name) for name in _LENGTHS if name in options]
    until = options.pop("until", [])
    draws = options.pop("do_sample", None)
    taken = {name: options.pop(name) for name in _TAKEN if name in options}
    if draws is not None:
        taken["temperature"] = taken.get("temperature", 1.0) if draws else 0.0
    for name, value in options.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise OptionError(f"generation_kwargs has {name}={value!r}, which has no meaning here; leave it out")
    if isinstance(until, list | tuple):
        until = [stop for stop in until if stop != ""]
    length = lengths[0] if lengths else max_tokens
    return Request(**taken, seed=seed, max_tokens=length, stop=until or None, raw=True, lookup=0)
