"""What the engine is asked to do: token ids, how to draw the answer, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..errors import OptionError
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from ..values import refusal, token_ids, whole
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
    - `draft`: a smaller model of the same vocabulary that drafts tokens, while no other job runs and where it pays more
      than lookup. `draft_cache`: layers that it has read something into.
    - `processors`: what changes the logits before a token is drawn, in this order.
    - `choices`: the answer is one of these lists of ids, the likeliest, and a stop id.
    - `scored_from`: the log-probability of the prompt's tokens from this place on is wanted (1: of all but the first,
      before which nothing stands); None: of none.
    - `candidates`: ids whose log-probability behind the prompt is wanted; scores follow those of the prompt's tokens.
    - `top`: how many of the likeliest tokens are told with each token of the answer and each score.
    - `length`: tokens that the sequence counts as having, where more than the prompt's are to come: it decides
      LongRoPE's regime from the first token on.
    - `branches`: how many jobs may continue at once what this one has read (`Scheduler.branch`). It then reads, and
      stays until it is finished from outside.

    Raises OptionError for a value of another type or outside its range.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = frozenset()
    cache: list[KVCache] | None = None
    kv_bits: KVBits | None = None
    lookup: int = 0
    draft: Model | None = None
    draft_cache: list[KVCache] | None = None
    processors: Sequence[Processor] = ()
    choices: Sequence[Sequence[int]] = ()
    scored_from: int | None = None
    candidates: Sequence[int] = ()
    top: int = 0
    length: int | None = None
    branches: int = 0

    def __post_init__(self) -> None:
        self._check_counts()
        if not isinstance(self.sampling, Sampling):
            raise refusal(self.sampling, "sampling", "a Sampling")
        if not isinstance(self.stop_ids, Collection) or token_ids(list(self.stop_ids)) is None:
            raise refusal(self.stop_ids, "stop_ids", "token ids")
        if self.kv_bits is not None and not isinstance(self.kv_bits, KVBits):
            raise refusal(self.kv_bits, "kv_bits", "a KVBits")
        for processor in self.processors:
            if not callable(processor) or not isinstance(getattr(processor, "reads_answer", None), bool):
                raise refusal(processor, "processors", "Processors, with reads_answer True or False")
        for ids in self.choices:
            if not token_ids(ids):
                raise refusal(ids, "choices", "lists of token ids, none of them empty")
        if self.scored_from is not None and not 1 <= whole(self.scored_from, "scored_from") <= len(self.prompt):
            raise OptionError(f"scored_from {self.scored_from} is outside its range; give 1 to {len(self.prompt)}")
        if self.branches and self.max_tokens != 0:
            raise OptionError("a job with branches answers nothing itself; give max_tokens=0")

    def _check_counts(self) -> None:
        for name, count in (("max_tokens", self.max_tokens), ("top", self.top)):
            if count is not None and whole(count, name) < 0:
                raise OptionError(f"{name} {count} is outside its range; give 0 or more")
        if not 0 <= whole(self.lookup, "lookup") <= KVCache.spare:  # a longer draft could not be taken back
            raise OptionError(f"lookup {self.lookup} is outside its range; give 0 (off) to {KVCache.spare}")
