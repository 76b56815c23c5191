"""Some prompts answered together, from the first to the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from ..errors import Phi3Error
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from .batch import Step
from .jobs import Job
from .machine import bounded_run
from .prefixes import PrefixStore
from .processors import Processor
from .rows import Row
from .sampling import Sampling
from .scheduler import Scheduler
from .tokens import Statistics, Token, checked_prompts


class Generation:
    """Some prompts answered together; iterate once for their tokens, a step of all rows after another.

    Every row gives what it would give alone. `cache`: reuse the part that matches the prompt, drop the rest once the
    run is sure to fit, and extend it.
    `max_tokens` is cut where the model's context ends. `kv_bits` packs the keys and values of new caches.
    `lookup`: tokens that are drafted from earlier text at most and verified in one step, where there is one row. There
    `draft`, a smaller model of the same vocabulary, drafts too; it reads into `draft_cache`, as `cache`, or a new one.
    `processors`: for each prompt, what changes its logits before a token is drawn.
    `on_prefill(done, total)` is called after each chunk, with tokens of all prompts. `room` is how many bytes the run
    may take beside the weights, by default what the machine has; prompts that do not fit beside others wait. The
    prefill chunk is as large as it allows unless `prefill_chunk` says it. `force` refuses nothing. `kept`: the cache
    outlives the run, so a refusal cannot offer other bits for it. `prefixes`: take what prompts begin with from there,
    and keep there what is read.

    Any thread may take the next token, and runs of several threads take turns: a chunk of a prompt, or a step.

    Raises PromptError for no prompt, an empty one, one of other than token ids of the vocabulary, or one that leaves no
    room to answer, OptionError for a value of another type or outside its range, MemoryLimitError for a run that does
    not fit, and while it runs CacheError if the cache was given to another. The error of one of several prompts says
    which it is (0: the first) and ends the run; a `Scheduler` goes on with the others.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        cache: list[KVCache] | None = None,
        kv_bits: KVBits | None = None,
        lookup: int = 0,
        draft: Model | None = None,
        draft_cache: list[KVCache] | None = None,
        processors: Sequence[Sequence[Processor]] | None = None,
        room: float | None = None,
        force: bool = False,
        kept: bool = False,
        prefill_chunk: int | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        prefixes: PrefixStore | None = None,
    ):
        prompts = checked_prompts(model, prompts)
        if cache is not None and len(prompts) != 1:
            raise ValueError("a cache is for one prompt")
        stop_ids = frozenset(stop_ids)
        if len(prompts) != 1:
            lookup, draft, draft_cache = 0, None, None
        jobs = [
            Job(prompt, max_tokens, sampling, stop_ids, cache, kv_bits, lookup, draft, draft_cache, changes)
            for prompt, changes in zip(prompts, processors or [()] * len(prompts), strict=True)
        ]
        scheduler = Scheduler(model, room=room, force=force, kept=kept, chunk=prefill_chunk, prefixes=prefixes)
        self._begin(scheduler, jobs, on_prefill)

    @classmethod
    def of_jobs(
        cls, scheduler: Scheduler, jobs: Sequence[Job], *, on_prefill: Callable[[int, int], None] | None = None
    ) -> Generation:
        """The same of jobs, which a scheduler that has none yet runs."""
        generation = cls.__new__(cls)
        generation._begin(scheduler, jobs, on_prefill)
        return generation

    def _begin(self, scheduler: Scheduler, jobs: Sequence[Job], on_prefill: Callable[[int, int], None] | None) -> None:
        self._scheduler, self._on_prefill = scheduler, on_prefill
        self._rows: list[Row] = []
        for job in jobs:
            try:
                self._rows.append(scheduler.submit(job))
            except Phi3Error as error:
                raise _named(error, len(self._rows), len(jobs)) from None
        self._raise_errors(scheduler.admit())
        self.statistics = Statistics(prompt_tokens=sum(len(job.prompt) for job in jobs))

    @property
    def cache(self) -> list[KVCache]:
        """What the one prompt is read into, one entry a layer."""
        return self._rows[0].cache

    @property
    def draft_cache(self) -> list[KVCache]:
        """What the draft model reads it into, one entry a layer; empty without one."""
        return self._rows[0].draft_cache

    def finish(self, row: int) -> None:
        """The caller has seen enough of this row."""
        self._rows[row].finish()

    def __iter__(self) -> Iterator[Token]:
        try:
            with bounded_run(self._scheduler.spare):
                yield from self._tokens()
        finally:
            self._scheduler.end()

    def _tokens(self) -> Iterator[Token]:
        mx.reset_peak_memory()
        seen = time.perf_counter()
        while self._scheduler.busy:
            step = self._scheduler.step()
            now = time.perf_counter()
            self._count(step, now - seen)
            seen = now
            if step.read and self._on_prefill:
                self._on_prefill(
                    sum(min(row.progress, len(row.job.prompt)) for row in self._rows), self.statistics.prompt_tokens
                )
            for token in step.tokens:
                if not self._rows[token.row].cancelled:  # perhaps before its turn in the step came
                    self.statistics.generated_tokens += 1
                    yield token
            if len(self._rows) > 1:  # the next to join needs the room
                for row in step.ended:
                    row.let_go()
            self._raise_errors(step.failed)

    def _count(self, step: Step, seconds: float) -> None:
        """Add a step to the statistics; `seconds` since the one before."""
        statistics = self.statistics
        statistics.prefilled_tokens = sum(len(row.job.prompt) - row.reused for row in self._rows)
        statistics.peak_memory = mx.get_peak_memory()
        if step.read or not statistics.generated_tokens:
            statistics.prompt_seconds += seconds
            return
        statistics.decode_seconds += seconds
        statistics.decoded_tokens += len(step.tokens)
        statistics.decode_steps += bool(step.tokens)
        if step.drafted:
            statistics.drafted_tokens += step.drafted
            statistics.accepted_tokens += len(step.tokens) - 1

    def _raise_errors(self, failed: Sequence[Row]) -> None:
        """Raise the error of the first row that failed, if there is one."""
        for row in failed:
            assert row.error is not None
            raise _named(row.error, self._rows.index(row), len(self._rows))


def _named(error: Exception, place: int, prompts: int) -> Exception:
    """The error, which says of which prompt it is where there are several."""
    if prompts > 1 and isinstance(error, Phi3Error):
        error.args = (f"prompt {place}: {error}", *error.args[1:])
    return error
