"""Token ids in, token ids out: prefill, decode, stop. Knows no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from ..errors import OptionError
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from ..threads import turn
from ..values import refusal, whole
from .drafts import decode_with_drafts
from .fitting import fit
from .machine import bounded_run
from .prefill import PromptProgress, cache_for, read_prompts, shared_length
from .rows import Row
from .sampler import Sampler
from .sampling import Sampling
from .steps import Drawn, Step, Stepper, read_drawn
from .tokens import Statistics, Token, checked_prompts


class Generation:
    """Some prompts decoded together; iterate once for their tokens, a step of all rows after another.

    Every row gives what it would give alone. `cache`: reuse the part that matches the prompt, drop the rest once the
    run is sure to fit, and extend it.
    `max_tokens` is cut where the model's context ends. `kv_bits` packs the keys and values of a new cache.
    `lookup`: tokens that are drafted from earlier text at most and verified in one step, where there is one row.
    `on_prefill(done, total)` is called after each chunk. `room` is how many bytes the run may take beside the weights,
    by default what the machine has; the prefill chunk is as large as it allows unless `prefill_chunk` says it. `force`
    refuses nothing. `kept`: the cache outlives the run, so a refusal cannot offer other bits for it.

    Any thread may take the next token, and runs of several threads take turns: a chunk of a prompt, or a step.

    Raises PromptError for no prompt, an empty one, one of other than token ids of the vocabulary, or one that leaves no
    room to answer, OptionError for a value of another type or outside its range, MemoryLimitError for a run that does
    not fit, and while it runs CacheError if the cache was given to another.
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
        room: float | None = None,
        force: bool = False,
        kept: bool = False,
        prefill_chunk: int | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ):
        prompts, max_tokens = checked_prompts(model, prompts), whole(max_tokens, "max_tokens")
        if not isinstance(sampling, Sampling):
            raise refusal(sampling, "sampling", "a Sampling")
        if not 0 <= whole(lookup, "lookup") <= KVCache.spare:  # a longer draft could not be taken back
            raise OptionError(f"lookup {lookup} is outside its range; give 0 (off) to {KVCache.spare}")
        if cache is not None and len(prompts) != 1:
            raise ValueError("a cache is for one prompt")
        context, stop_ids = model.config.max_position_embeddings, frozenset(stop_ids)
        self._rows = [
            Row(index, prompt, min(max_tokens, context - len(prompt)), stop_ids) for index, prompt in enumerate(prompts)
        ]
        self._lookup = lookup if len(prompts) == 1 else 0
        self._on_prefill = on_prefill
        self.statistics = Statistics(prompt_tokens=sum(map(len, prompts)))
        bits = kv_bits if cache is None else cache[0].bits
        with turn():
            shared = 0 if cache is None else shared_length(cache, prompts[0])
            self._fit = fit(
                model,
                self._rows,
                cache=cache,
                shared=shared,
                bits=bits,
                chunk=prefill_chunk,
                room=room,
                force=force,
                kept=kept,
            )
            sampler = Sampler(sampling, prompts, model.config.vocab_size)
            mx.eval(sampler.state)
            cache = cache_for(model, prompts, given=cache, shared=shared, bits=bits, chunk=self._fit.chunk)
            self._stepper = Stepper(model, cache, sampler)

    @property
    def cache(self) -> list[KVCache]:
        """What the run reads into, one entry a layer."""
        return self._stepper.cache

    def finish(self, row: int) -> None:
        """The caller has seen enough of this row."""
        self._rows[row].finish()

    def __iter__(self) -> Iterator[Token]:
        with bounded_run(self._fit.spare):
            mx.reset_peak_memory()
            events = self._run()
            while (event := self._turn(events)) is not None:
                if isinstance(event, Token):
                    yield event
                elif self._on_prefill:
                    self._on_prefill(*event)

    def _turn(self, events: Iterator[Token | PromptProgress]) -> Token | PromptProgress | None:
        """The next of `events`, after which all that is kept is computed or queued."""
        with turn():
            try:
                return next(events, None)
            except BaseException:  # Ctrl-C may fall anywhere
                self._stepper.settle()
                raise

    def _run(self) -> Iterator[Token | PromptProgress]:
        """What a turn ends with: progress of the prompts, then tokens."""
        started, prompts = time.perf_counter(), [row.prompt for row in self._rows]
        self.statistics.prefilled_tokens = self.statistics.prompt_tokens - self._stepper.offset
        first = self._stepper.begin((yield from read_prompts(self._stepper, prompts, self._fit.chunk)))
        self.statistics.prompt_seconds = time.perf_counter() - started
        longest = max(map(len, prompts))
        yield longest, longest
        started = time.perf_counter()
        for step in self._steps(first):
            self._count(step, time.perf_counter() - started)
            for row, token, logprob in step.tokens:
                if not row.finished:  # the caller may end it before its turn in the step comes, or inside a draft
                    said = row.say(token, logprob)
                    self.statistics.generated_tokens += 1
                    yield said

    def _steps(self, first: Drawn) -> Iterator[Step]:
        if self._lookup:
            return decode_with_drafts(self._stepper, self._rows[0], first, self._lookup)
        return decode_plainly(self._stepper, self._rows, first)

    def _count(self, step: Step, seconds: float) -> None:
        """Add a step to the statistics; `seconds` since the first began."""
        statistics = self.statistics
        statistics.decode_seconds = seconds
        statistics.peak_memory = mx.get_peak_memory()
        decoded = sum(row.said > 0 for row, _, _ in step.tokens)  # a row's first token was drawn with its prompt
        statistics.decoded_tokens += decoded
        statistics.decode_steps += decoded > 0
        if step.drafted:
            statistics.drafted_tokens += step.drafted
            statistics.accepted_tokens += len(step.tokens) - 1


def decode_plainly(stepper: Stepper, rows: Sequence[Row], pending: Drawn) -> Iterator[Step]:
    """The steps of all rows, a token of each, until every row is finished. `pending`: what the prompts' end gave."""
    active = list(rows)
    while slots := [slot for slot, row in enumerate(active) if not row.finished]:
        if len(slots) < len(active):
            active = [active[slot] for slot in slots]
            pending = stepper.select(slots, pending)
        drawn = pending
        # The next step is queued before the last token is read, so the device never waits for Python.
        if any(row.left > 1 for row in active):
            pending = stepper.queue(drawn[0][:, None])
        read = read_drawn(drawn)
        yield Step([(row, *token) for row, token in zip(active, read, strict=True)])
