"""What the engine is asked to do: token ids, how to draw the answer, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..errors import OptionError
from ..models.cache import KVBits, KVCache
from ..values import refusal, whole
from .processors import Processor
from .sampling import Sampling


@dataclass(frozen=True)
class Job:
    """A prompt's token ids and how they are to be answered.

    - `max_tokens`: the answer's length at most; None: as long as the context and memory allow.
    - `stop_ids`: ids that end the answer, which they are the last of.
    - `cache`: layers that have read something; what the prompt begins with is reused, the rest dropped.
    - `kv_bits`: how a new cache is packed.
    - `lookup`: tokens at most that are drafted from earlier text and verified in one step, while no other job runs.
    - `processors`: what changes the logits before a token is drawn, in this order.
    - `scored_from`: the log-probability of the prompt's tokens from this place on is wanted; None: of none.

    Raises OptionError for a value of another type or outside its range.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = frozenset()
    cache: list[KVCache] | None = None
    kv_bits: KVBits | None = None
    lookup: int = 0
    processors: Sequence[Processor] = ()
    scored_from: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            whole(self.max_tokens, "max_tokens")
        if not isinstance(self.sampling, Sampling):
            raise refusal(self.sampling, "sampling", "a Sampling")
        if not 0 <= whole(self.lookup, "lookup") <= KVCache.spare:  # a longer draft could not be taken back
            raise OptionError(f"lookup {self.lookup} is outside its range; give 0 (off) to {KVCache.spare}")
