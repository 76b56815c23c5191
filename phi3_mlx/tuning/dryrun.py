"""What a run would do: counts, lengths, what is cut, examples with what is learnt, memory and time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..sizes import size_text
from .batches import Schedule, make_part, split_parts
from .examples import Example, histogram
from .gradients import Gradients
from .plan import allowed_bytes
from .run import Prepared, load_for_training

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_SHOWN, _SHOWN_TOKENS = 3, 120
STYLES = _LEARNT, _PLAIN = "\033[1;32m", "\033[0m"


def describe_run(prepared: Prepared, *, color: bool = False, measure: bool = True, force: bool = False) -> str:
    """The report of `--dry-run`. With `color` learnt tokens are bold and green, else they stand between ⟦ and ⟧.

    `measure` loads the model, if it fits or by `force`, and times one batch for the time estimate.
    """
    settings, train, valid = prepared.settings, prepared.train, prepared.valid
    lengths = [len(example) - 1 for example in train.examples]
    schedule = Schedule.of(lengths, settings)
    lines = [
        f"Data      {len(train.lengths):,} training example{'' if len(train.lengths) == 1 else 's'}, "
        f"{len(valid.lengths):,} to validate on",
        f"          {sum(lengths):,} tokens an epoch, {train.trained_tokens:,} of them learnt; "
        f"{schedule.steps:,} steps, {schedule.steps_per_epoch:,} an epoch",
    ]
    lines += [f"          {note}" for note in prepared.notes]
    lines += ["", "Lengths   tokens        examples", *_bars(train.lengths, settings.max_length), ""]
    for example in train.examples[:_SHOWN]:
        lines += [f"Example   {example.source}", _rendered(example, prepared.tokenizer, color), ""]
    memory = prepared.plan
    limit = size_text(allowed_bytes(settings, prepared.available))
    verdict = f"does NOT fit in {limit}; {prepared.way_out}" if prepared.way_out else f"fits in {limit}"
    lines += [
        f"Memory    about {size_text(memory.total)}: weights {size_text(memory.weights)}, training "
        f"{size_text(memory.trained)}, activations {size_text(memory.activations)} for {memory.part_tokens:,} tokens "
        "at once",
        f"          {verdict}",
    ]
    if measure and (force or not prepared.way_out):
        seconds, tokens = _time_a_batch(prepared, schedule)
        epochs, rest = divmod(schedule.steps, schedule.steps_per_epoch)
        total = epochs * sum(lengths) + sum(lengths[i] for step in range(rest) for i in schedule.batch(step))
        lines.append(
            f"Time      about {duration_text(seconds / tokens * total)} of training; "
            f"{tokens / seconds:,.0f} tok/s in one batch"
        )
    return "\n".join(lines)


def _bars(lengths: list[int], longest: int | None) -> list[str]:
    rows = histogram(lengths)
    most = max(count for _, _, count in rows)
    lines = [
        f"          {f'{first:,}-{last:,}':13} {count:6,}  {'#' * max(bool(count), round(30 * count / most))}"
        for first, last, count in rows
    ]
    if longest is not None and (over := sum(length > longest for length in lengths)):
        lines.append(f"          {over:,} {'is' if over == 1 else 'are'} longer than {longest:,}")
    return lines


def _rendered(example: Example, tokenizer: Tokenizer, color: bool) -> str:
    """The example's text, decoded in runs of learnt and other tokens."""
    begin, end = (_LEARNT, _PLAIN) if color else ("⟦", "⟧")
    pieces, first = [], 0
    shown = min(len(example), _SHOWN_TOKENS)
    for n in range(1, shown + 1):
        if n == shown or example.trained[n] != example.trained[first]:
            text = tokenizer.decode(example.ids[first:n].tolist(), skip_special=False)
            pieces.append(f"{begin}{text}{end}" if example.trained[first] else text)
            first = n
    return "".join(pieces) + (f" … {len(example) - shown:,} more tokens" if shown < len(example) else "")


def _time_a_batch(prepared: Prepared, schedule: Schedule) -> tuple[float, int]:
    """(seconds, tokens) of one batch of middle size, forward and backward, after one that warms up."""
    settings, examples = prepared.settings, prepared.train.examples
    model, _ = load_for_training(prepared)
    model.train()
    lengths = [len(example) - 1 for example in examples]
    batches = sorted(
        (schedule.batch(step) for step in range(min(schedule.steps, schedule.steps_per_epoch))),
        key=lambda b: sum(lengths[i] for i in b),
    )
    parts = [part for part in split_parts(batches[len(batches) // 2], lengths, settings.accumulate) if part]
    gradients = Gradients(model, checkpoint=settings.gradient_checkpointing)
    for _ in range(2):
        started = time.perf_counter()
        for part in parts:
            gradients.of(make_part([examples[i] for i in part]))
    return time.perf_counter() - started, sum(lengths[i] for part in parts for i in part)


def duration_text(seconds: float) -> str:
    """Seconds as people read them: "45 seconds", "12 minutes", "1.5 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
