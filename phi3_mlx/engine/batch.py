"""Rows that are answered together: they join and leave between any two steps. Knows no text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..errors import CacheError, Phi3Error
from ..models.decoder import Model
from ..models.slots import give_back, take_out, unused_bytes
from . import machine
from .drafts import Drafter
from .passes import Pass, queue_pass
from .rows import FORCED, Answered, Row
from .tokens import Token

_NOTHING_LEFT = "the processors of this request exclude every token, or make a logit NaN, so no token can be drawn"
_LEAST_CHUNK = 32
_NAN = "the model computed NaN: its weights are bad or its number type overflows; load it with dtype='float32'"


@dataclass
class Step:
    """What a step gave.

    `tokens`: of each row the next, or several that were drafted. `read`: rows of which a part of the prompt was read,
    `read_tokens` in all. `ended`: rows that have left, `failed`: those of them with an error. `drafted`: how many
    tokens were verified.
    """

    tokens: list[Token] = field(default_factory=list)
    read: list[Row] = field(default_factory=list)
    ended: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    read_tokens: int = 0
    drafted: int = 0


class Batch:
    """The one decode loop: every step reads a token of each row that answers, and a chunk of those that join.

    Each row has a cache of its own, so what it reads, sees and holds is what it would alone; weights are read once
    for all rows. The next pass is queued before the last tokens are read, so the device never waits for Python.
    """

    def __init__(self, model: Model):
        self._model = model
        self.rows: list[Row] = []
        self._queued: Pass | None = None
        self._drafter: Drafter | None = None  # of the row that was alone last
        self._rate: float | None = None  # tokens of prompts a second

    def add(self, row: Row, chunk: int) -> None:
        """Let a row join with the next step. `chunk` is `Row.begin`'s."""
        row.begin(chunk)
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Let a row leave as it is, between two steps; what is queued of it is not told."""
        self.rows.remove(row)
        self._forget_drafter()
        if self._queued is not None:
            self._queued.leave_out(row)

    @property
    def unused_bytes(self) -> int:
        """What the caches of all rows hold beyond what the rows need, for others that may come."""
        return unused_bytes([row.cache for row in self.rows if row.begun])

    def give_back(self) -> None:
        """Free that."""
        give_back([row.cache for row in self.rows if row.begun])

    @property
    def answering(self) -> bool:
        """Whether some row waits for its next token: it has read its prompt, and its budget is not used up."""
        return any(not row.finished and not row.reading and row.left > 0 for row in self.rows)

    def step(self, chunk: int, seconds: tuple[float, float], on_read: Callable[[Row], None] | None = None) -> Step:
        """Queue the next pass, and tell what the last one gave.

        It reads `chunk` tokens of prompts at most, and about as many as take `seconds`: while rows answer, and while
        none does. `on_read` is called with a row when a further part of its prompt is in its cache, and computed.
        An error in a row ends that row alone, and one of the whole pass ends all of them. So does what breaks the step
        off (Ctrl-C), which is raised.
        """
        step = Step()
        try:
            self._step(step, chunk, seconds, on_read)
        except Exception as error:  # of which row cannot be told
            self._queued = None
            for row in self.rows:
                row.fail(error)
        except BaseException:
            rows, self.rows, self._queued, self._drafter = self.rows, [], None, None
            for row in rows:
                row.finish()
            _settle(rows)
            raise
        step.ended = [row for row in self.rows if row.finished]
        step.failed = [row for row in step.ended if row.error is not None]
        _settle([row for row in step.ended if row.error is not None or row.job.cache is not None])
        self.rows = [row for row in self.rows if not row.finished]
        if not self.rows:
            self._queued = None  # it holds the last rows, and nobody may take a further step
        self._forget_drafter()
        return step

    def _step(
        self, step: Step, chunk: int, seconds: tuple[float, float], on_read: Callable[[Row], None] | None
    ) -> None:
        queued, self._queued = self._queued, None
        started = time.perf_counter()
        if queued is not None and queued.reading:
            # Waited for: MLX would else hold the arrays of this chunk and of the next.
            queued.finish_reading()
            mx.clear_cache()
            for row in queued.reading:
                if any(math.isnan(score.logprob) for score in row.scores):
                    row.fail(Phi3Error(_NAN))
                if on_read is not None and row.error is None:
                    on_read(row)
            step.read, step.read_tokens = queued.reading, queued.read_tokens
            self._rate = queued.read_tokens / (queued.seconds + time.perf_counter() - started)
            if queued.rows and machine.on_cpu():
                # A CPU computes most of the next pass while it is queued, for which first tokens need not wait.
                self._tell(queued.tokens(), step)
                return
        chunk = self._timed(chunk, seconds[0 if self.answering else 1])
        drafter = self._drafter_of_one()
        if drafter is not None and queued is None and self._draft(drafter, step):
            return
        started = time.perf_counter()
        # A row that is likely to draft waits: a draft is read behind a token that is known.
        waits = queued is not None and drafter is not None and drafter.likely
        ahead = None if queued is None or waits else self._queue(queued, chunk)
        if queued is not None:
            self._tell(queued.tokens(), step)
        if ahead is not None and drafter is not None and len(step.tokens) == 1 and not ahead.forced:
            drafter.times.saw_plain(time.perf_counter() - started)
        if ahead is None and not waits:
            ahead = self._queue(None, chunk)
        if ahead is not None:
            ahead.draw_late()
        self._queued = ahead

    def _timed(self, chunk: int, seconds: float) -> int:
        """How many tokens of prompts, of `chunk`, to read in that time; few, as long as nobody knows how fast it is."""
        if math.isinf(seconds):
            return chunk
        return int(min(chunk, max(_LEAST_CHUNK, 0 if self._rate is None else self._rate * seconds)))

    def _drafter_of_one(self) -> Drafter | None:
        """The drafter of a row that is alone, for others keep the device as busy; None where it does not draft now."""
        rows = [row for row in self.rows if not row.finished]
        if len(rows) != 1 or not rows[0].drafts:
            return None
        if self._drafter is None or self._drafter.row is not rows[0]:
            self._drafter = Drafter(rows[0], self._model)
        if rows[0].reading:
            self._drafter.follow()
            return None
        return self._drafter

    def _forget_drafter(self) -> None:
        """Let go of the drafter of a row that has left."""
        if self._drafter is not None and self._drafter.row not in self.rows:
            self._drafter = None

    def _draft(self, drafter: Drafter, step: Step) -> bool:
        """Verify the tokens that the row drafts, if it does."""
        draft = drafter.draft()
        told = drafter.verify(draft) if draft else []
        step.drafted = len(draft)
        self._tell(told, step)
        return bool(draft)

    def _queue(self, last: Pass | None, chunk: int) -> Pass | None:
        """Begin the pass after `last`, whose tokens need not be known; after None, behind tokens that are."""
        reading = [row for row in self.rows if row.reading]
        if last is None:
            decoding = [row for row in self.rows if not row.finished and not row.reading and row.left > 0]
        else:
            decoding = [row for row in last.staying if not row.finished and row.budget - len(last.known(row)) > 1]
        for rows in (reading, decoding):
            for row in list(rows):
                try:
                    row.check_claim()
                except CacheError as error:
                    row.fail(error)
                    rows.remove(row)
        if not reading and not decoding:
            return None
        runs = self._runs(decoding, last, chunk // 2 if reading else chunk)
        decoding = [row for row in decoding if row not in runs]
        ids = None
        if decoding:
            ids = mx.array([[row.answer[-1] for row in decoding]]) if last is None else last.ids_of(decoding)
        started = time.perf_counter()
        queued = queue_pass(self._model, decoding, ids, runs, reading, chunk)
        queued.seconds = time.perf_counter() - started  # on a CPU most of it is computed meanwhile
        return queued

    @staticmethod
    def _runs(rows: list[Row], last: Pass | None, most: int) -> dict[Row, list[int]]:
        """Of each row whose next tokens are forced, those that it reads: its newest, and all that must follow.

        Behind a pass whose tokens are not told yet the newest is the first that must follow. `most`: tokens of all rows
        beside the newest.
        """
        runs: dict[Row, list[int]] = {}
        for row in rows:
            if last is None:
                run = [row.answer[-1], *row.forced(row.answer, min(most, FORCED))]
            else:
                run = row.forced(last.known(row), min(most, FORCED))
            if len(run) > 1:
                runs[row] = run
                most -= len(run) - 1
        return runs

    def _tell(self, tokens: list[Answered], step: Step) -> None:
        for row, token, logprob, top in tokens:
            if row.finished:
                continue
            if math.isnan(logprob):
                row.fail(Phi3Error(_NAN))
            elif math.isinf(logprob):
                row.fail(Phi3Error(_NOTHING_LEFT))
            else:
                step.tokens.append(row.say(token, logprob, top))


def _settle(rows: list[Row]) -> None:
    """Compute all that the caches of rows that leave keep: no other thread could, and some outlive the batch.

    Those that jobs brought must not keep the arrays of other rows.
    """
    take_out([row.cache for row in rows if row.job.cache is not None])
    mx.eval([row.to_compute for row in rows])
