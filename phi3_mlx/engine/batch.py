"""Token ids in, token ids out: prefill, decode, stop. Knows no text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CacheError, Phi3Error
from ..models.attention import fused_attention
from ..models.cache import REREAD_CHUNK, KVBits, KVCache
from ..models.decoder import Model
from ..threads import turn
from . import machine
from . import plan as memory
from .lookup import Drafter, accepted_of
from .machine import bounded_run
from .plan import Run
from .sampler import Sampler
from .sampling import Sampling
from .tokens import FinishReason, Statistics, Token, check_prompt

Drawn = tuple[mx.array, mx.array]  # token ids (B,) and their log-probabilities (B,), perhaps not computed yet
_LONG = 512  # tokens of a prompt's last chunk for which the last layer takes longer than a step of one token
_PAD = 0  # any id: padding is never seen


Step = Token | tuple[int, int]  # what a turn ends with: a token, or how much of how long a prompt is read


class Generation:
    """Some prompts decoded together; iterate once for their tokens, a step of all rows after another.

    Every row gives what it would give alone. `cache`, if given, has read something: what the one prompt begins with is
    used, the rest is forgotten when the run is sure to fit, and it is extended.
    `max_tokens` is cut where the model's context ends. `kv_bits` packs the keys and values of a new cache.
    `lookup`: tokens that are drafted from earlier text at most and verified in one step, where there is one row.
    `on_prefill(done, total)` is called after each chunk. `room` is how many bytes the run may take beside the weights,
    by default what the machine has; the prefill chunk is as large as it allows unless `prefill_chunk` says it. `force`
    refuses nothing. `kept`: the cache outlives the run, so a refusal cannot offer other bits for it.

    Any thread may take the next token, and runs of several threads take turns: a chunk of a prompt, or a step.

    Raises PromptError for an empty prompt, ids outside the vocabulary, or one that leaves no room to answer,
    MemoryLimitError for a run that does not fit, and while it runs CacheError if the cache was given to another.
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
        for prompt in prompts:
            check_prompt(model, prompt)
        if cache is not None and len(prompts) != 1:
            raise ValueError("a cache is for one prompt")
        self._model, self._prompts, self._stop_ids = model, prompts, frozenset(stop_ids)
        context = model.config.max_position_embeddings
        self._budgets = [min(max_tokens, context - len(prompt)) for prompt in prompts]
        self._kv_bits = kv_bits if cache is None else cache[0].bits
        self._on_prefill = on_prefill
        self._lookup = lookup if len(prompts) == 1 else 0
        self._finished: set[int] = set()
        self.statistics = Statistics(prompt_tokens=sum(map(len, prompts)))
        with turn():
            shared = self._shared_with(cache)
            self._plan(cache, shared, room, force, kept, prefill_chunk)
            self._sampler = Sampler(sampling, prompts, model.config.vocab_size)
            mx.eval(self._sampler.state)
            self.cache = self._new_cache() if cache is None else self._taken_over(cache, shared)
            self.cache[0].sequence.prompt_length = tuple(map(len, prompts))
            self.cache[0].sequence.reread_chunk = min(self._chunk, REREAD_CHUNK)
            # Not the run itself: a cycle would keep its keys and values until Python looks for cycles.
            self.cache[0].sequence.reader = self._reader = object()

    def _shared_with(self, cache: list[KVCache] | None) -> int:
        """How many tokens of the prompt need not be read."""
        if cache is None:
            return 0
        read: list[int] = cache[0].sequence.ids[0, : cache[0].offset].tolist()  # type: ignore[assignment]
        return common_length(read, self._prompts[0][:-1])  # the last is read anew: its logits begin the answer

    def _plan(
        self,
        cache: list[KVCache] | None,
        shared: int,
        room: float | None,
        force: bool,
        kept: bool,
        chunk: int | None,
    ) -> None:
        """Choose the prefill chunk; MemoryLimitError if the run does not fit."""
        model, lengths = self._model, [len(prompt) for prompt in self._prompts]
        ends = max(map(sum, zip(lengths, self._budgets, strict=True)))
        rereads = 0
        if cache is not None and (
            cache[0].lost_at(shared) or cache[0].sequence.long != (model.model.is_long(lengths[0]),)
        ):
            rereads = shared
        if model.model.is_long(ends) and not all(map(model.model.is_long, lengths)):
            rereads = max(rereads, memory.reread_at_boundary(model.config))
        run = Run(
            model.config,
            sum(array.nbytes for _, array in tree_flatten(model.parameters())),
            max(lengths) + max(self._budgets),  # shorter rows are padded in front: all answers begin together
            len(lengths),
            self._kv_bits,
            model.dtype.size,
            fused_attention(),
            chunk,
            rereads,
            len(set(lengths)) > 1,
        )
        held = sum(layer.nbytes for layer in cache or ())
        held = run.weights + (min(held, run.cache_bytes()) if shared else held)
        if force:
            room = machine.room() + held
            plan = run.plan(room)
        else:
            room = (machine.room() if room is None else room) + held
            plan = memory.check_fits(run, room, prompt=max(lengths), kept=kept or cache is not None)
        self._chunk, self._spare = plan.chunk, max(room - plan.total, 0)

    def _taken_over(self, cache: list[KVCache], shared: int) -> list[KVCache]:
        """The cache with what the prompt begins with, or a new one."""
        cache[0].sequence.reader = None  # whoever reads with it now is to hear of it
        for layer in cache:
            layer.trim(layer.offset - shared)
            layer.shrink()
        return cache if shared else self._new_cache()

    def _new_cache(self) -> list[KVCache]:
        lengths = [len(prompt) for prompt in self._prompts]
        padding = [max(lengths) - length for length in lengths]
        return self._model.make_cache(lengths, padding if any(padding) else None, self._kv_bits)

    def finish(self, row: int) -> None:
        """The caller has seen enough of this row."""
        self._finished.add(row)

    def __iter__(self) -> Iterator[Token]:
        with bounded_run(self._spare):
            mx.reset_peak_memory()
            steps = self._run()
            while (step := self._turn(steps)) is not None:
                if isinstance(step, Token):
                    yield step
                elif self._on_prefill:
                    self._on_prefill(*step)

    def _turn(self, steps: Iterator[Step]) -> Step | None:
        """The next of `steps`, after which all that is kept is computed or queued."""
        with turn():
            try:
                return next(steps, None)
            except BaseException:  # Ctrl-C may fall anywhere
                mx.eval([layer.state for layer in self.cache], self.cache[0].sequence.kept)
                raise

    def _run(self) -> Iterator[Step]:
        started = time.perf_counter()
        longest = max(map(len, self._prompts))
        hidden = yield from self._prefill(longest)
        pending = self._draw(hidden)
        mx.eval(pending, self._sampler.state)
        self.statistics.prompt_seconds = time.perf_counter() - started
        yield longest, longest
        self._started = time.perf_counter()
        if self._lookup and self._budgets[0] > 0:
            yield from self._decode_with_drafts(pending)
        else:
            yield from self._decode(pending)

    def _decode(self, pending: Drawn) -> Iterator[Token]:
        """All rows, a token each a step. `pending`: what was drawn after the prompts, not read yet."""
        active, step = [row for row, budget in enumerate(self._budgets) if budget > 0], 0
        if active and len(active) < len(self._prompts):
            pending = self._select(active, pending)
        while active:
            drawn = pending
            step += 1
            # The next step is queued before the last token is read, so the device never waits for Python.
            more = any(self._budgets[row] > step for row in active)
            if more:
                pending = self._queue(drawn[0][:, None])
            read = self._read(drawn)
            if step > 1:
                self._count_step(len(active))
            for row, (token, logprob) in zip(active, read, strict=True):
                if row not in self._finished:
                    yield self._token(row, token, logprob, step)
            keep = [slot for slot, row in enumerate(active) if row not in self._finished]
            active = [active[slot] for slot in keep]
            if more and active and len(keep) < len(read):
                pending = self._select(keep, pending)

    def _decode_with_drafts(self, first: Drawn) -> Iterator[Token]:
        """The one row; where earlier text suggests what comes next, that is verified in one step.

        The tokens are those of `_decode`: a draft's token counts only if the same was drawn in its place.
        """
        drafter = Drafter(self._prompts[0], self._lookup)
        pending: Drawn | None = first
        budget, step, last = self._budgets[0], 0, _PAD
        while step < budget and 0 not in self._finished:
            started, ahead = time.perf_counter(), None
            if pending is None:
                draft = drafter.draft(self._most_drafted(budget - step - 1))
                if not draft:
                    pending = self._queue(mx.array([[last]]))
                    continue
                read = self._verify(last, draft)
                drafter.saw_draft(len(draft), len(read) - 1, time.perf_counter() - started)
                self._count_step(len(read))
            else:
                # A step is queued before the last token is read, unless it is likely to become a draft's.
                if step + 1 < budget and not drafter.draft(1):
                    ahead = self._queue(pending[0][:, None])
                read = self._read(pending)
                if step:
                    self._count_step(1)
                if ahead is not None:
                    drafter.saw_plain(time.perf_counter() - started)
                pending = ahead
            for last, logprob in read:
                step += 1
                drafter.add(last)
                token = self._token(0, last, logprob, step)
                yield token
                if token.finish_reason or 0 in self._finished:  # a stop string may end the row amid a draft
                    return

    def _most_drafted(self, wanted: int) -> int:
        """How many tokens may be read ahead after the next: not past the boundary of a LongRoPE regime."""
        model, total = self._model.model, self.cache[0].offset + 1
        if not model.is_long(total) and model.is_long(total + min(wanted, self._lookup)):
            wanted = min(wanted, self._model.config.original_max_position_embeddings - total)
        return wanted

    def _verify(self, last: int, draft: list[int]) -> list[tuple[int, float]]:
        """Read `last` and the draft in one step; what is drawn after `last` and every right token of the draft."""
        logits = self._model.logits(self._forward(mx.array([[last, *draft]])))
        states, drawn = [], []
        for i in range(len(draft) + 1):
            drawn.append(self._sampler(logits[:, i]))
            states.append(self._sampler.state)
        read = self._read((mx.concatenate([t for t, _ in drawn]), mx.concatenate([p for _, p in drawn])))
        accepted = accepted_of(draft, [token for token, _ in read])
        self._sampler.state = states[accepted]
        mx.async_eval(self._sampler.state)
        for layer in self.cache:
            layer.trim(len(draft) - accepted)
        self.statistics.drafted_tokens += len(draft)
        self.statistics.accepted_tokens += accepted
        return read[: accepted + 1]

    def _queue(self, ids: mx.array) -> Drawn:
        """Begin the step that reads `ids` (B, 1)."""
        pending = self._draw(self._forward(ids))
        mx.async_eval(pending, self._sampler.state)
        return pending

    def _read(self, drawn: Drawn) -> list[tuple[int, float]]:
        """Wait for the tokens and their log-probabilities."""
        ids: list[int] = drawn[0].tolist()  # type: ignore[assignment]
        odds: list[float] = drawn[1].tolist()  # type: ignore[assignment]
        if any(map(math.isnan, odds)):
            raise Phi3Error(
                "the model computed NaN, so its weights or its number type fail; load it with dtype='float32'"
            )
        self.statistics.decode_seconds = time.perf_counter() - self._started
        self.statistics.peak_memory = mx.get_peak_memory()
        return list(zip(ids, odds, strict=True))

    def _count_step(self, tokens: int) -> None:
        self.statistics.decode_steps += 1
        self.statistics.decoded_tokens += tokens

    def _token(self, row: int, token: int, logprob: float, step: int) -> Token:
        reason: FinishReason | None = None
        if token in self._stop_ids:
            reason = "stop"
        elif step >= self._budgets[row]:
            reason = "length"
        if reason:
            self._finished.add(row)
        self.statistics.generated_tokens += 1
        return Token(row, token, logprob, reason)

    def _prefill(self, longest: int) -> Generator[Step, None, mx.array]:
        """Read the prompts, `longest` tokens; yields how far it is, returns their last hidden states (B, 1, hidden)."""
        ids = mx.array([[_PAD] * (longest - len(prompt)) + list(prompt) for prompt in self._prompts], dtype=mx.int32)
        done = self.cache[0].offset
        self.statistics.prefilled_tokens = self.statistics.prompt_tokens - done
        while True:
            last = min(done + self._chunk, longest)
            if last == longest and last - done >= _LONG:
                last -= 1  # read alone, it spares all others the last layer, of which they need but the keys
            hidden = self._forward(ids[:, done:last])
            mx.eval([layer.state for layer in self.cache])
            if last == longest:
                return hidden[:, -1:]
            del hidden  # what the last layer did not compute would hold its keys, which would be copied to grow
            mx.clear_cache()
            yield last, longest
            done = last

    def _forward(self, ids: mx.array) -> mx.array:
        """Hidden states of `ids` (B, L), which the cache takes in."""
        if self.cache[0].sequence.reader is not self._reader:
            raise CacheError("another prompt was read with this prompt cache meanwhile; use one cache for each stream")
        return self._model.model(ids, self.cache)

    def _draw(self, hidden: mx.array) -> Drawn:
        return self._sampler(self._model.logits(hidden)[:, -1])

    def _select(self, keep: list[int], pending: Drawn) -> Drawn:
        """Drop the rows that are done from the cache, the sampler and the queued step."""
        rows = mx.array(keep)
        self.cache[0].sequence.select(rows)
        for layer in self.cache:
            layer.select(rows)
        self._sampler.select(keep)
        return pending[0][rows], pending[1][rows]


def common_length(a: Iterable[int], b: Iterable[int]) -> int:
    """How many of the first ids are the same."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
