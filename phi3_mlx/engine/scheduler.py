"""Which jobs run: what fits joins, what does not yet waits; prompts are read in chunks between the others' steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from ..errors import MemoryLimitError
from ..models.cache import fork
from ..models.decoder import Model
from ..models.hooks import edits_of
from ..threads import turn
from ..values import refusal
from . import machine
from .batch import Batch, Step
from .fitting import ANSWER_BLOCK, brought_by, held_by, workload_of
from .identity import ModelState
from .jobs import Job
from .plan import Plan, Workload, check_fits, check_length, draft_weights, plan_together
from .prefill import common_length
from .prefixes import LEAST, PrefixStore
from .rows import FORCED, Row
from .tokens import check_ids, checked_prompts

CHUNK_SECONDS = 0.5  # the longest that rows which answer wait for a chunk of a newcomer's prompt


class Elsewhere(Protocol):
    """What else in this process takes memory of the same room.

    `reserved`: bytes that others were promised and do not hold yet. `freeable`: bytes that they hold, and would give
    back in time.
    """

    @property
    def reserved(self) -> float: ...

    @property
    def freeable(self) -> float: ...


class Scheduler:
    """Runs jobs of one model, each as it would run alone; `step` while it is `busy`, from any thread.

    `room` is how many bytes the jobs may take beside the weights, by default what the machine has. A chunk of prompts
    is as large as that allows unless `chunk` says it, and takes `chunk_seconds` at most while rows answer,
    `alone_seconds` while none does. `force` refuses nothing, and lets nothing wait. `kept`: caches outlive their jobs,
    so a refusal cannot offer other bits.
    `prefixes`: what jobs without a cache of their own and their draft models read is kept there, and what they begin
    with is taken from it, up to the first token that is scored; it gives way to a job that would have to wait. Of jobs
    that begin alike one reads, and the others wait for it.
    `elsewhere`: what else takes memory, for which jobs wait too, until `retry`.
    """

    def __init__(
        self,
        model: Model,
        *,
        room: float | None = None,
        force: bool = False,
        kept: bool = False,
        chunk: int | None = None,
        chunk_seconds: float = CHUNK_SECONDS,
        alone_seconds: float = math.inf,
        prefixes: PrefixStore | None = None,
        elsewhere: Elsewhere | None = None,
    ):
        self._elsewhere = elsewhere
        self._model, self._room, self._force, self._kept = model, room, force, kept
        self._seconds = chunk_seconds, alone_seconds
        self._of_model = replace(Workload.of_model(model, 0), chunk=chunk)  # to count weights takes a while
        self._prefixes = prefixes if model.of_family else None  # other caches cannot be cut into pieces
        self._states: dict[int, ModelState] = {}  # of models by their id, as this step has found them
        self._batch = Batch(model)
        self._waiting: deque[Row] = deque()
        self._workloads: dict[Row, Workload] = {}  # of the rows that run, oldest first
        self._plan: Plan | None = None
        self._lacking: Row | None = None  # the row that did not fit, while no other has left since
        self._submitted = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._batch.rows)

    @property
    def lacks(self) -> bool:
        """Whether a job waits for memory."""
        return self._lacking is not None and not self._lacking.finished

    def retry(self) -> None:
        """Let a job that waits for memory try again: others have given some back."""
        self._lacking = None

    @property
    def held(self) -> int:
        """Bytes of the caches of what runs."""
        return sum(held_by(row, workload) for row, workload in self._workloads.items())

    @property
    def reserved(self) -> float:
        """Bytes that what runs was promised and does not hold yet."""
        if self._plan is None or not self._workloads:
            return 0.0
        weights = self._of_model.weights + draft_weights(self._workloads.values())
        return max(self._plan.total - weights - self.held, 0.0)

    @property
    def spare(self) -> float:
        """Bytes of the room that the plan of what runs leaves, and caches do not hold for rows that may come."""
        if self._plan is None:
            return 0.0
        return max(self._available(self._workloads) - self._plan.total - self._batch.unused_bytes, 0.0)

    @turn()
    def submit(self, job: Job) -> Row:
        """Let a job join as soon as it fits.

        Its row has an `index`, the ids of the `answer` so far and the `error` that it ended with, if it did; `finish()`
        ends it, and it keeps its cache until `let_go()`.

        Raises PromptError for an empty prompt, ids outside the vocabulary, or one that leaves no room to answer,
        OptionError for what is no Job and for bits that the model's heads cannot have, and MemoryLimitError, with the
        numbers, for a job that would not fit alone.
        """
        if not isinstance(job, Job):
            raise refusal(job, "job", "a Job")
        checked_prompts(self._model, [job.prompt], answered=job.max_tokens != 0)
        for ids in job.choices:
            check_ids(self._model, ids)
            check_length(self._model.config, len(job.prompt) + len(ids) - 1)
        self._model.make_cache(None, None, job.kv_bits)  # or it would be refused only when it joins
        row = Row(self._submitted, job, self._model)
        if not self._force:
            self._check_alone(row, workload_of(self._of_model, row))
        self._submitted += 1
        self._waiting.append(row)
        return row

    @turn()
    def branch(self, row: Row, job: Job) -> Row:
        """Let a job join at once that continues what `row` has read: at most its job's `branches` at a time.

        The two have their memory planned together, so `row` must not be finished before.
        """
        assert self._plan is not None
        child = Row(self._submitted, replace(job, cache=fork(row.cache)), self._model)
        self._submitted += 1
        self._batch.add(child, self._plan.chunk)
        return child

    @turn()
    def admit(self) -> list[Row]:
        """Let rows that wait join, in their order, until one does not fit yet.

        Returns those that failed instead: what fitted when it was submitted does not any more.
        """
        failed, self._states = [], {}
        for row in list(self._waiting):
            if row.finished:
                self._waiting.remove(row)
                continue
            if self._awaits_another(row):
                continue
            if row is self._lacking:  # a plan takes as long as a step of a small model
                break
            workload = workload_of(self._of_model, row)
            workloads = {**self._workloads, row: workload}
            plan, lacking = self._planned(workloads)
            if not self._gives_way(lacking):
                try:
                    if not self._workloads:
                        self._check_alone(row, workload)
                except MemoryLimitError as error:
                    row.fail(error)
                    failed.append(row)
                    self._waiting.remove(row)
                    continue
                if self._workloads or self._freeable:
                    self._lacking = row
                    break
            self._waiting.remove(row)
            self._copy(row, lacking)
            self._batch.add(row, plan.chunk)
            self._plan, self._workloads = plan, workloads
            self._keep(row)  # what it begins with, if that came from a file
        return failed

    @turn()
    def step(self) -> Step:
        """Admit what fits, and take a step of all rows that run."""
        failed = self.admit()
        if not self._batch.rows:
            return Step(ended=failed, failed=failed)
        assert self._plan is not None
        try:
            step = self._batch.step(self._plan.chunk, self._seconds, self._keep_read)
            for row in self._workloads:
                if row.finished:
                    self._keep(row, release=not self._kept, save=True)
        finally:
            for row in self._workloads.keys() - {*self._batch.rows}:
                del self._workloads[row]
                self._lacking = None
        step.ended += failed
        step.failed += failed
        for row in list(self._workloads):
            if row in self._workloads and row.job.max_tokens is None:
                self._extend(row)
        return step

    def end(self) -> None:
        """Store what rows have read that nobody will step on."""
        if self._prefixes is None:
            return  # also where Python ends, and a turn may never come
        with turn():
            self._states = {}
            for row in self._workloads:
                self._keep(row, save=True)
            self._workloads = {}
        self._prefixes.settle()  # not in a turn: other runs go on

    def _extend(self, row: Row) -> None:
        """Reserve memory for a further block of an answer without a limit, if it is about to need it.

        Where there is none left, the youngest row pauses. A row that is alone ends with the token that is on its way.
        """
        workload = self._workloads[row]
        if row.read + 2 + max(row.job.lookup, FORCED) <= workload.length or row.left <= 1:
            return
        longer = replace(workload, length=min(workload.length + ANSWER_BLOCK, row.read + row.left))
        while True:
            workloads = {**self._workloads, row: longer}
            plan, lacking = self._planned(workloads)
            if self._gives_way(lacking):
                if self._prefixes is not None:
                    self._prefixes.give_way(lacking)
                self._plan, self._workloads = plan, workloads
                return
            youngest = [other for other in self._workloads if not other.job.branches][-1]
            if len(self._workloads) == 1:
                row.budget = len(row.answer) + 1
                return
            self._batch.remove(youngest)
            self._keep(youngest, release=True)
            del self._workloads[youngest]
            youngest.pause()
            self._waiting.appendleft(youngest)
            if youngest is row:
                return

    def _planned(self, workloads: Mapping[Row, Workload]) -> tuple[Plan, float]:
        """The plan of these rows, and how many bytes they lack.

        Of what it leaves, caches may hold half for rows that may come: more is freed.
        """
        room = self._available(workloads)
        plan = plan_together(list(workloads.values()), room)
        if (unused := self._batch.unused_bytes) and 2 * unused > room - plan.total:
            self._batch.give_back()
            room = self._available(workloads)
            plan = plan_together(list(workloads.values()), room)
        return plan, max(plan.total - room, 0.0)

    def _check_alone(self, row: Row, workload: Workload) -> None:
        """MemoryLimitError if the row would not fit even if no other ran."""
        room = self._available({**self._workloads, row: workload}) + self._stored + self._freeable
        if self._room is None:  # what others compute with now is given back, and is no more than they were promised
            room += self.reserved + (0 if self._elsewhere is None else self._elsewhere.reserved)
        kept = self._kept or row.job.cache is not None
        check_fits(workload, room, prompt=len(row.prompt) if row.left else 0, kept=kept)

    def _available(self, workloads: Mapping[Row, Workload]) -> float:
        """Bytes that these rows may take, weights and what they hold already among them."""
        weights = self._of_model.weights + draft_weights(workloads.values())
        if self._room is None or self._force:
            held = sum(held_by(row, workload) for row, workload in workloads.items())
            return machine.room() + weights + held - (0 if self._elsewhere is None else self._elsewhere.reserved)
        brought = sum(brought_by(row, workload) for row, workload in workloads.items())
        return self._room + weights + brought - self._stored

    @property
    def _freeable(self) -> float:
        """Bytes that there were more if nothing ran elsewhere."""
        return 0.0 if self._elsewhere is None else self._elsewhere.reserved + self._elsewhere.freeable

    # What was read is read once.

    def _awaits_another(self, row: Row) -> bool:
        """Whether a row that runs is about to read much of what this one's prompt begins with."""
        return self._reuses(row) and any(
            self._reuses(other)
            and other.bits == row.bits
            and self._model.model.is_long(other.length) == self._model.model.is_long(row.length)
            and (shared := common_length(other.prompt, row.reusable[:-1])) - other.reused >= LEAST
            and shared > other.progress
            for other in self._workloads
        )

    def _gives_way(self, lacking: float) -> bool:
        """Whether there will be `lacking` bytes more once stored prefixes are forgotten."""
        return self._force or lacking <= self._stored

    @property
    def _stored(self) -> int:
        """Bytes of the prefixes that are stored."""
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def _copy(self, row: Row, lacking: float) -> None:
        """Take the longest stored beginning of what a row is to read, which joins in `lacking` bytes more."""
        if self._prefixes is None:
            return
        if not self._reuses(row):
            self._prefixes.give_way(lacking)
            return
        for cache in row.caches:
            cache.state = self._state_of(cache.model)
            cache.copied = self._prefixes.cache_for(
                cache.model,
                row.reusable,
                cache.bits,
                length=row.length,
                lacking=lacking if cache is row.main else 0,
                state=cache.state,
            )

    def _keep(self, row: Row, *, release: bool = False, save: bool = False) -> None:
        """Store what a row has read, in a file too if `save`. `release`: it lets go of its own, layer by layer."""
        if self._prefixes is None or row.error is not None:
            return
        for cache in row.caches:
            if cache.layers and cache.state is not None and cache.state is self._state_of(cache.model):
                self._prefixes.give(cache.model, cache.layers, cache.state, self.spare, release=release, save=save)

    def _keep_read(self, row: Row) -> None:
        """Store what a row has read of its prompt, unless that is so little that nobody waits for it."""
        if row.progress - row.reused >= LEAST:
            self._keep(row)

    def _state_of(self, model: Model) -> ModelState:
        """The state that a model is in, which takes a while to tell: once a step."""
        assert self._prefixes is not None
        if id(model) not in self._states:
            self._states[id(model)] = self._prefixes.state_of(model)
        return self._states[id(model)]

    def _reuses(self, row: Row) -> bool:
        """Whether a row takes what is stored, and stores what it reads.

        Not if its job brought a cache, or a model's values are changed (`hooks`).
        """
        edited = any(edits_of(cache.model.model) for cache in row.caches)
        return self._prefixes is not None and row.main.given is None and not edited
