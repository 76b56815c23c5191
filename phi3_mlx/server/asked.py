"""What a request asks for, in the words of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..generation.request import Request
from .limits import Limits
from .streams import Reply
from .work import Work

if TYPE_CHECKING:
    from ..models.decoder import LongRopeRule


class Asked(NamedTuple):
    """What a request asks for, and the reply that takes what the engine tells of it."""

    works: Sequence[Work]
    reply: Reply
    streamed: bool


@dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say otherwise, and what no request can change: the rule of LongRoPE."""

    request: Request
    longrope: LongRopeRule
    limits: Limits


# Makes that of a body. Raises ApiError.
AskReader = Callable[[Mapping[str, Any], Defaults], Asked]
