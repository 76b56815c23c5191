"""A pass through the model for the rows of a batch: the tokens that each brings, and what is drawn after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

import mlx.core as mx

from ..models.decoder import Model
from .processors import processed
from .rows import Answered, Row
from .sampler import Drawn, SamplerState, draw
from .scores import Scores, TokenScore


class Pass:
    """What was queued: `ids` and `logprobs` (rows,) are the next tokens of `rows`, perhaps not computed yet.

    Rows whose processors read the answer stand last; they are drawn by `draw_late`, when the token before is known.
    `forced`: of rows that read what must follow, those ids; they are told before the one that is drawn.
    `reading` are the rows of which a part of the prompt is read, `read_tokens` in all; `scored`, how many scores of
    which rows come of it; `seconds`, how long it was queued and waited for.
    """

    def __init__(
        self,
        rows: list[Row],
        reading: list[Row],
        read_tokens: int,
        logits: mx.array | None,
        scored: _Scored | None,
        forced: Mapping[Row, list[int]],
        forced_scored: _Scored | None,
    ):
        self.reading, self.read_tokens = reading, read_tokens
        self.seconds = 0.0
        self._scored = scored
        self.forced, self._forced_scored = forced, forced_scored
        self.rows: list[Row] = []
        self._late = [row for row in rows if any(processor.reads_answer for processor in row.processors)]
        self._late_logits: mx.array | None = None
        self._drawn: list[Drawn] = []
        # What each draws with, to draw it again; those that were left out are not among them.
        self._before: dict[Row, SamplerState] = {row: row.sampler.state for row in (*rows, *reading)}
        if logits is None:
            return
        early = [row for row in rows if row not in self._late]
        if self._late:
            self._late_logits = logits[mx.array([rows.index(row) for row in self._late])]
            mx.async_eval(self._late_logits)
            logits = logits[mx.array([rows.index(row) for row in early])] if early else None
        if logits is not None:
            self._draw(early, logits)

    def finish_reading(self) -> None:
        """Wait for what is read and scored, and let the rows know."""
        scores = [] if self._scored is None else self._scored.scores.arrays
        mx.eval([row.to_compute for row in self.reading], scores)
        for row in self.reading:
            row.progress = row.read
        if self._scored is not None:
            for row, scores_of_row in self._scored.told():
                if row in self._before:
                    row.scores += scores_of_row

    def leave_out(self, row: Row) -> None:
        """Tell nothing of this row, and undo its draw: it leaves, and may come back."""
        self.reading = [other for other in self.reading if other is not row]
        if row in self._before:
            row.sampler.state = self._before.pop(row)

    def draw_late(self) -> None:
        """Draw the rows that waited for the token before."""
        late, logits, self._late, self._late_logits = self._late, self._late_logits, [], None
        kept = [i for i, row in enumerate(late) if not row.finished]
        if logits is not None and kept:
            self._draw([late[i] for i in kept], logits[mx.array(kept)])

    def _draw(self, rows: list[Row], logits: mx.array) -> None:
        """Draw the next token of each row from logits (rows, vocab_size); a processor that fails ends its row alone."""
        logits = logits.astype(mx.float32)
        scores = None
        if any(row.processors for row in rows):
            changed: dict[Row, mx.array] = {}
            for row, own_logits in zip(rows, logits, strict=True):
                try:
                    row.decide()
                    changed[row] = processed(row.processors, self.known(row), own_logits)
                except Exception as error:
                    row.fail(error)
            kept = [i for i, row in enumerate(rows) if row in changed]
            if not kept:
                return
            rows, logits, scores = list(changed), logits[mx.array(kept)], mx.stack(list(changed.values()))
        self.rows += rows
        for row in rows:
            row.sampler.skip(self.forced.get(row, ()))
        drawn = draw([row.sampler for row in rows], logits, scores, [row.job.top for row in rows])
        self._drawn.append(drawn)
        mx.async_eval(
            drawn.ids,
            drawn.logprobs,
            drawn.top.arrays,
            [row.sampler.state for row in rows],
            [row.main.ids_to_compute for row in rows],
        )

    def ids_of(self, rows: Sequence[Row]) -> mx.array:
        """The next tokens of these rows (1, rows), perhaps not computed yet."""
        ids = _joined([drawn.ids for drawn in self._drawn])
        if len(rows) < len(self.rows):
            ids = ids[mx.array([self.rows.index(row) for row in rows])]
        return ids[None]

    def tokens(self) -> list[Answered]:
        """Wait for the tokens of all rows and their log-probabilities."""
        if not self._drawn:
            return []
        ids: list[int] = _joined([drawn.ids for drawn in self._drawn]).tolist()  # type: ignore[assignment]
        logprobs: list[float] = _joined([drawn.logprobs for drawn in self._drawn]).tolist()  # type: ignore[assignment]
        tops = [top for drawn in self._drawn for top in drawn.top.told()]
        before = {} if self._forced_scored is None else dict(self._forced_scored.told())
        told: list[Answered] = []
        for token in map(Answered, self.rows, ids, logprobs, tops):
            if token.row in self._before:
                scores = zip(self.forced.get(token.row, ()), before.get(token.row, ()), strict=True)
                told += [Answered(token.row, forced, score.logprob, score.top) for forced, score in scores]
                told.append(token)
        return told

    def known(self, row: Row) -> list[int]:
        """The answer of a row up to the token that is drawn, as long as nothing of this pass was told."""
        return [*row.answer, *self.forced.get(row, ())]

    @property
    def staying(self) -> list[Row]:
        """Its rows without those that have left."""
        return [row for row in self.rows if row in self._before]


def queue_pass(
    model: Model,
    decoding: list[Row],
    ids: mx.array | None,
    runs: Mapping[Row, list[int]],
    reading: Sequence[Row],
    chunk: int,
) -> Pass:
    """Begin a pass, and wait for nothing.

    The rows that are `decoding` bring the tokens `ids` (1, rows), those with `runs` their newest token and all that
    must follow it. Rows that are still `reading` bring the next tokens of their prompts, in this order, `chunk` at most
    with what the runs add.
    """
    parts: list[tuple[Row, mx.array]] = []
    chunk -= sum(len(run) - 1 for run in runs.values())
    for row in reading:
        first, last = row.read, min(row.read + chunk, len(row.prompt))
        if last > first:
            parts.append((row, mx.array([row.prompt[first:last]], dtype=mx.int32)))
            chunk -= last - first
    # The model wants those of one token first.
    singles = [part for part in parts if part[1].shape[1] == 1]
    others = [part for part in parts if part[1].shape[1] > 1]
    others += [(row, mx.array([run], dtype=mx.int32)) for row, run in runs.items()]
    rows = [*decoding, *(row for row, _ in singles), *(row for row, _ in others)]
    arrays = [*([] if ids is None else [ids]), *(ids for _, ids in singles), *(ids for _, ids in others)]
    lengths = [1] * (len(decoding) + len(singles)) + [ids.shape[1] for _, ids in others]
    joined = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=1)
    scoring = bool(runs) or any(row.targets(row.read, row.read + ids.shape[1]) for row, ids in parts)
    if lengths == [1]:
        hidden = model.model(joined, rows[0].cache)[0]  # (rows, hidden_size)
    else:
        hidden = model.model.together(joined, lengths, [row.cache for row in rows], newest=not scoring)[0]
    ends_of_all = [end - 1 for end in accumulate(lengths)]  # the newest token of each sequence
    read, read_tokens = [row for row, _ in parts], sum(ids.shape[1] for _, ids in parts)
    scored = forced_scored = None
    if scoring:
        ends = dict(zip(rows, accumulate(lengths), strict=True))
        scored = _scored(model, hidden, {row: _targets(row, ends[row], ids.shape[1]) for row, ids in parts})
        forced_scored = _scored(model, hidden, {row: _forced_targets(run, ends[row]) for row, run in runs.items()})
        hidden = hidden[mx.array(ends_of_all)]
    draws = [i for i, row in enumerate(rows) if row.read >= len(row.prompt) and row.left > 0]
    drawing = [rows[i] for i in draws]
    if drawing and len(drawing) < len(rows):
        hidden = hidden[mx.array(draws)]
    forced = {row: run[1:] for row, run in runs.items()}
    logits = model.logits(hidden, [ends_of_all[i] for i in draws]) if drawing else None
    queued = Pass(drawing, read, read_tokens, logits, scored, forced, forced_scored)
    if partly := [row.to_compute for row in read if row not in drawing]:
        mx.async_eval(partly)  # another thread could not, and may take the next step
    return queued


Targets = list[tuple[int, list[int]]]  # places in a row of tokens, and the ids that may follow each


class _Scored:
    """The scores of what may follow some places of rows, as many for each row as it has targets."""

    def __init__(self, model: Model, hidden: mx.array, targets: Mapping[Row, Targets]):
        wanted = [target for of_row in targets.values() for target in of_row]
        top = [row.job.top for row, of_row in targets.items() for _ in of_row]
        self.scores = Scores(model, hidden, [ids for _, ids in wanted], top, places=[place for place, _ in wanted])
        self._counts = {row: sum(len(ids) for _, ids in of_row) for row, of_row in targets.items()}

    def told(self) -> list[tuple[Row, list[TokenScore]]]:
        """Wait for them."""
        told = iter(self.scores.told())
        return [(row, list(islice(told, count))) for row, count in self._counts.items()]


def _scored(model: Model, hidden: mx.array, targets: Mapping[Row, Targets]) -> _Scored | None:
    """hidden (tokens, hidden_size), in which the targets' places are."""
    return _Scored(model, hidden, targets) if any(targets.values()) else None


def _targets(row: Row, end: int, length: int) -> Targets:
    """What is scored of the `length` tokens that a row has read last, the last of which stands before place `end`."""
    return [(end - row.read + place, ids) for place, ids in row.targets(row.read - length, row.read)]


def _forced_targets(run: list[int], end: int) -> Targets:
    """All of a run but its first token; the last stands before place `end`."""
    return [(place, [token]) for place, token in enumerate(run[1:], end - len(run))]


def _joined(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
