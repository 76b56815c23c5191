"""What a request asks for, in the words of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..generation.request import Request
from .limits import Limits
from .streams import Reply
from .work import Work


class Asked(NamedTuple):
    """What a request asks for, and the reply that takes what the engine tells of it."""

    works: Sequence[Work]
    reply: Reply
    streamed: bool


# Makes that of a body, the options that it leaves out, and what it may ask for at most. Raises ApiError.
AskReader = Callable[[Mapping[str, Any], Request, Limits], Asked]
