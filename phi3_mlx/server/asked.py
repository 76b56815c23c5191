"""What a request asks for, in the words of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
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
    """What holds for a request that does not say otherwise, and what no request can change: the rule of LongRoPE.

    `others`: the models of other families, which mlx-lm's code runs.
    """

    request: Request
    longrope: LongRopeRule
    limits: Limits
    others: Collection[str] = ()

    def fingerprint(self, model: str) -> str:
        """What answers say of the code that has made them."""
        return f"phi3-mlx-{__version__}{'-with-mlx-lm' if model in self.others else ''}"


# Makes that of a body. Raises ApiError.
AskReader = Callable[[Mapping[str, Any], Defaults], Asked]
