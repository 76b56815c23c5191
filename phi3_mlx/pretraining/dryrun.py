"""What a pretraining would do: the model, the data, phases and rates, a row as it is read, memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..sizes import size_text
from ..store.checkpoint import DTYPES
from ..store.family import parameter_count
from ..tuning.dryrun import memory_lines, time_line
from ..tuning.plan import allowed_bytes
from .mixture import MixedBatches
from .optimizer import rate_of
from .rows import Sources
from .run import PreparedPretraining, course_of, load_fresh
from .settings import PretrainSettings

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_ROW_DOCUMENTS, _DOCUMENT_TOKENS = 4, 30  # of a row, and of each document


def describe_pretraining(prepared: PreparedPretraining, *, measure: bool = True, force: bool = False) -> str:
    """The report of `--dry-run`. `measure` makes the model, if it fits or by `force`, and times one batch."""
    settings, corpus, config = prepared.settings, prepared.corpus, prepared.config
    numbers, dtype = parameter_count(config), settings.dtype or "float32"
    read = _tokens_read(corpus.train, corpus.batches)
    lines = [
        f"Model     {numbers:,} parameters: {config.num_hidden_layers} layers of {config.hidden_size:,}, vocabulary "
        f"{config.vocab_size:,}; {size_text(numbers * DTYPES[dtype].size)} in {dtype}",
        "",
        *_data_lines(corpus.train, settings.max_length or 0),
        f"          {sum(rows.documents for rows in corpus.valid.sources):,} documents to validate on, in "
        f"{len(corpus.valid):,} rows",
        *(f"          {note}" for note in prepared.notes),
        "",
        f"Steps     {corpus.batches.steps:,} of {settings.batch_size:,} rows, about {read / corpus.batches.steps:,.0f} "
        f"tokens each: {read:,.0f} tokens, {read / int(corpus.train.lengths.sum()):.2f} times those that there are",
        *_phase_lines(corpus.train, corpus.batches),
        "",
        *_rate_lines(settings, corpus.batches.steps),
        "",
        *_row_lines(corpus.train, corpus.batches.batch(0), prepared.tokenizer),
        "",
        *memory_lines(prepared.plan, allowed_bytes(settings, prepared.available), prepared.way_out),
    ]
    if measure and (force or not prepared.way_out):
        model = load_fresh(prepared)
        lines.append(time_line(model, course_of(prepared), settings, corpus.train, corpus.train.lengths, read))
    return "\n".join(lines)


def _data_lines(train: Sources, longest: int) -> list[str]:
    lines: list[str] = []
    for rows in train.sources:
        beside = [
            f"{count:,} {what}"
            for count, what in (
                (rows.cut, "longer than a row and cut into pieces"),
                (rows.left_out, "left out, of one token"),
            )
            if count
        ]
        lines.append(
            f"{'' if lines else 'Data':9} {rows.directory}: {rows.documents:,} documents to train on, "
            f"{int(rows.lengths.sum()):,} tokens in {len(rows):,} rows of at most {longest:,}"
            + (f"; {', '.join(beside)}" if beside else "")
        )
    return lines


def _phase_lines(train: Sources, batches: MixedBatches) -> list[str]:
    """Of each phase how many rows of each source it reads, and how often that reads the source."""
    means, lines = _row_tokens(train), []
    ends = [*(phase.first for phase in batches.phases[1:]), batches.steps]
    for number, (phase, end) in enumerate(zip(batches.phases, ends, strict=True), 1):
        counts = batches.counts(phase.first, end)
        shares = counts * means / (counts * means).sum()
        lines.append(f"Phase {number}   steps {phase.first + 1:,} to {end:,}")
        lines += [
            f"          {rows.directory}: {count:,} rows, {share:.1%} of the tokens; read {count / len(rows):.2f} times"
            for rows, count, share in zip(train.sources, counts.tolist(), shares, strict=True)
            if count
        ]
    return lines


def _rate_lines(settings: PretrainSettings, steps: int) -> list[str]:
    """The learning rates where they turn, and between."""
    turns = {1, steps, settings.warmup_steps(steps) + 1, *(round(steps * share) for share in (0.25, 0.5, 0.75))}
    if settings.schedule == "wsd":
        turns.add(steps - round(settings.decay * steps) + 1)
    if settings.phase2_rate is not None:
        turns |= {settings.phase2_step(steps), settings.phase2_step(steps) + 1}
    muon = settings.optimizer == "muon"
    lines = [f"Rates     {'step':>10} {'AdamW':>10}{'Muon':>11}" if muon else f"Rates     {'step':>10} {'AdamW':>10}"]
    for step in sorted(step for step in turns if 1 <= step <= steps):
        rate = rate_of(settings, step - 1, steps)
        line = f"          {step:>10,} {rate:>10.3g}"
        lines.append(f"{line} {rate * settings.muon_rate / settings.learning_rate:>10.3g}" if muon else line)
    return lines


def _row_lines(train: Sources, batch: list[int], tokenizer: Tokenizer) -> list[str]:
    """The documents of the batch's row that has most of them, decoded, each between ⟦ and ⟧."""
    rows, place = max((train.find(row) for row in batch), key=lambda spot: len(spot[0].pieces(spot[1])))
    sequences, pieces = rows[place].sequences, rows.pieces(place)
    count = "1 document" if len(pieces) == 1 else f"{len(pieces)} documents"
    lines = [f"Row       of the first step, from {rows.directory}: {int(rows.lengths[place]):,} tokens of {count}"]
    for sequence, (document, first) in [*zip(sequences, pieces, strict=True)][:_ROW_DOCUMENTS]:
        text = tokenizer.decode(sequence.ids[:_DOCUMENT_TOKENS].tolist(), skip_special=False)
        more = len(sequence) - _DOCUMENT_TOKENS
        begins = f" from token {first + 1:,} on" if first else ""
        lines.append(
            f"          document {document:,}{begins} ⟦{text}{f' … {more:,} more tokens' if more > 0 else ''}⟧"
        )
    if len(pieces) > _ROW_DOCUMENTS:
        lines.append(f"          and {len(pieces) - _ROW_DOCUMENTS} more")
    return lines


def _row_tokens(train: Sources) -> np.ndarray:
    """The tokens of a row of each source, on average."""
    return np.array([rows.lengths.mean() for rows in train.sources])


def _tokens_read(train: Sources, batches: MixedBatches) -> float:
    """About how many tokens a run reads."""
    return float((batches.counts(0, batches.steps) * _row_tokens(train)).sum())
