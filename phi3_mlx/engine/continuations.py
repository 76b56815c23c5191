"""Continuations of prompts, scored together: what those of one prompt share is read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import MemoryLimitError
from ..models.cache import KVBits
from ..models.decoder import Model
from ..threads import turn
from .jobs import Job
from .machine import bounded_run
from .prefixes import PrefixStore
from .rows import Row, raise_first
from .scheduler import Scheduler
from .scores import TokenScore

_PROMPTS_AT_ONCE = 8  # at once: enough to fill a pass, and each holds a cache and those of its continuations
_BRANCHES_AT_ONCE = 16  # continuations of a prompt at once, fewer where memory is short


@dataclass(frozen=True)
class Continued:
    """A prompt with one of its continuations: the tokens of `ids` from `scored_from` (1 or more) on are scored."""

    ids: tuple[int, ...]
    scored_from: int


class _Group:
    """Continuations of one prompt that are in the same LongRoPE regime, and what is known of them.

    Those that differ in the last token alone are one job. Several jobs share a *trunk*: a job that reads what they all
    begin with, and of which each continues a fork. `scores`: by the place of a continuation among all of its prompt.
    """

    def __init__(self, continued: Iterable[tuple[int, Continued]], kv_bits: KVBits | None):
        self.scores: dict[int, list[TokenScore]] = {}
        self._kv_bits = kv_bits
        self._ends: dict[tuple[tuple[int, ...], int], dict[int, list[int]]] = {}
        for place, each in continued:
            ends = self._ends.setdefault((each.ids[:-1], each.scored_from), {})
            ends.setdefault(each.ids[-1], []).append(place)
        self._waiting = deque(self._ends)
        self._reading: dict[Row, tuple[tuple[int, ...], int]] = {}
        self._trunk: Row | None = None

    def begin(self, runs: Scheduler) -> None:
        """Let the trunk join. Raises MemoryLimitError if it, and one continuation at a time, would not fit alone."""
        shared = min(scored_from for _, scored_from in self._ends) - 1
        if len(self._ends) == 1 or shared == 0:
            return
        length = max(len(ids) for ids, _ in self._ends) + 1
        branches = min(_BRANCHES_AT_ONCE, len(self._ends))
        trunk = Job(self._waiting[0][0][:shared], 0, kv_bits=self._kv_bits, length=length, branches=branches)
        while self._trunk is None:
            try:
                self._trunk = runs.submit(trunk)
            except MemoryLimitError:
                if trunk.branches == 1:
                    raise
                trunk = replace(trunk, branches=trunk.branches // 2)

    def go_on(self, runs: Scheduler) -> bool:
        """Take what was scored since, and let more continuations join; whether some are left."""
        for row in [row for row in self._reading if row.finished]:
            self._take(self._reading.pop(row), row.scores)
        most = _BRANCHES_AT_ONCE if self._trunk is None else self._trunk.job.branches
        ready = self._trunk is None or (self._trunk.begun and self._trunk.progress == len(self._trunk.prompt))
        while ready and self._waiting and len(self._reading) < most:
            ids, scored_from = stem = self._waiting.popleft()
            # The last token is not read, but the sequence is as long as if it were.
            job = Job(
                ids,
                0,
                kv_bits=self._kv_bits,
                scored_from=scored_from,
                candidates=[*self._ends[stem]],
                length=len(ids) + 1,
            )
            self._reading[runs.submit(job) if self._trunk is None else runs.branch(self._trunk, job)] = stem
        left = bool(self._waiting or self._reading)
        if self._trunk is not None and not left:
            self._trunk.finish()
        return left

    def _take(self, stem: tuple[tuple[int, ...], int], scores: Sequence[TokenScore]) -> None:
        ends = self._ends[stem]
        before = len(scores) - len(ends)
        for last, places in zip(scores[before:], ends.values(), strict=True):
            for place in places:
                self.scores[place] = [*scores[:before], last]


def score_together(
    model: Model,
    prompts: Sequence[Sequence[Continued]],
    *,
    kv_bits: KVBits | None = None,
    force: bool = False,
    prefixes: PrefixStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[TokenScore]]]:
    """The scores of all tokens from `scored_from` on, of each continuation of each prompt.

    Those of a prompt have in common what stands before the first token that any of them scores. Each comes out as if
    its ids had been read alone. `prefixes`: what prompts begin with is taken from there, and what is read is kept
    there. `progress(done, total)` counts prompts. Raises MemoryLimitError unless `force`.
    """
    scored: list[list[list[TokenScore]]] = []
    for of_prompt in score_each(model, prompts, kv_bits=kv_bits, force=force, prefixes=prefixes):
        scored.append(of_prompt)
        if progress is not None:
            progress(len(scored), len(prompts))
    return scored


def score_each(
    model: Model,
    prompts: Sequence[Sequence[Continued]],
    *,
    kv_bits: KVBits | None = None,
    force: bool = False,
    prefixes: PrefixStore | None = None,
) -> Generator[list[list[TokenScore]], None, None]:
    """`score_together`, prompt by prompt: each in its turn, as soon as it and those before it were read."""
    groups = [_groups(model, continued, kv_bits) for continued in prompts]
    waiting = deque(group for of_prompt in groups for group in of_prompt)
    running: list[_Group] = []
    runs = Scheduler(model, force=force, prefixes=prefixes)
    told = 0

    def let_join() -> None:
        running[:] = [group for group in running if group.go_on(runs)]  # first: all may have ended at once
        while waiting and len(running) < _PROMPTS_AT_ONCE:
            waiting[0].begin(runs)
            running.append(waiting.popleft())
            running[-1].go_on(runs)

    def scored() -> Iterator[list[list[TokenScore]]]:
        nonlocal told
        while told < len(prompts):
            if sum(len(group.scores) for group in groups[told]) < len(prompts[told]):
                return
            by_place = {place: tokens for group in groups[told] for place, tokens in group.scores.items()}
            groups[told].clear()
            told += 1
            yield [by_place[place] for place in range(len(by_place))]

    with turn():
        let_join()
        raise_first(runs.admit())
    try:
        with bounded_run(runs.spare):
            while running:
                with turn():
                    step = runs.step()
                    for row in step.ended:
                        row.let_go()  # those that wait need the room
                    let_join()
                raise_first(step.failed)
                yield from scored()
    finally:
        runs.end()
    yield from scored()


def _groups(model: Model, continued: Sequence[Continued], kv_bits: KVBits | None) -> list[_Group]:
    """The continuations of a prompt, one group for each LongRoPE regime."""
    by_regime: dict[bool, list[tuple[int, Continued]]] = {}
    for place, each in enumerate(continued):
        by_regime.setdefault(model.model.is_long(len(each.ids)), []).append((place, each))
    return [_Group(alike, kv_bits) for alike in by_regime.values()]
