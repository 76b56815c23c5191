"""What a run would do: counts, lengths, what is cut, examples with what is learnt, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..display import duration_text
from ..sizes import size_text
from .batches import Schedule, split_parts, tokens_read
from .course import Course
from .examples import Example, histogram
from .gradients import Gradients
from .pairs import Labelled, PreferencePair
from .plan import TrainingPlan, allowed_bytes
from .run import Prepared, load_for_training
from .run_settings import RunSettings

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

_SHOWN, _SHOWN_TOKENS = 3, 120
_TIMED_FROM = 1000  # batches, for one of middle size
STYLES = _LEARNT, _PLAIN = "\033[1;32m", "\033[0m"


def describe_run(prepared: Prepared, *, color: bool = False, measure: bool = True, force: bool = False) -> str:
    """The report of `--dry-run`. With `color` learnt tokens are bold and green, else they stand between ⟦ and ⟧.

    `measure` loads the model, if it fits or by `force`, and times one batch for the time estimate.
    """
    settings, train, valid = prepared.settings, prepared.train, prepared.valid
    lengths = [*map(tokens_read, train.examples)]
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
        lines.append(f"Example   {example.source}")
        for sequence, name in zip(example.sequences, _names(example), strict=True):
            lines += [*([f"          {name}"] if name else []), _rendered(sequence, prepared.tokenizer, color), ""]
    lines += memory_lines(prepared.plan, allowed_bytes(settings, prepared.available), prepared.way_out)
    if measure and (force or not prepared.way_out):
        epochs = schedule.steps // schedule.steps_per_epoch
        rest = range(epochs * schedule.steps_per_epoch, schedule.steps)
        total = epochs * sum(lengths) + sum(lengths[i] for step in rest for i in schedule.batch(step))
        model, _ = load_for_training(prepared)
        course = Course.of_tuning(settings, lengths)
        lines.append(time_line(model, course, settings, train.examples, np.array(lengths), total))
    return "\n".join(lines)


def _names(example: Any) -> tuple[str, ...]:
    """What the sequences of an example are."""
    if isinstance(example, PreferencePair):
        return "chosen", "rejected"
    return ("desirable" if example.desirable else "undesirable",) if isinstance(example, Labelled) else ("",)


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


def memory_lines(plan: TrainingPlan, limit: int, way_out: str) -> list[str]:
    """A plan of memory, and whether it fits in `limit` bytes."""
    verdict = f"does NOT fit in {size_text(limit)}; {way_out}" if way_out else f"fits in {size_text(limit)}"
    return [
        f"Memory    about {size_text(plan.total)}: weights {size_text(plan.weights)}, training "
        f"{size_text(plan.trained)}, activations {size_text(plan.activations)} for {plan.part_tokens:,} tokens at once",
        f"          {verdict}",
    ]


def time_line(
    model: Model, course: Course, settings: RunSettings, examples: Sequence[Any], lengths: np.ndarray, total: float
) -> str:
    """How long it takes to train on `total` tokens, by one batch of middle size, timed after it was read once.

    `lengths`: of the examples, the tokens that the model reads (n,).
    """
    model.train()
    steps = range(min(course.batches.steps, course.batches.steps_per_epoch, _TIMED_FROM))
    in_order = sorted(map(course.batches.batch, steps), key=lambda batch: int(lengths[batch].sum()))
    middle = in_order[len(in_order) // 2]
    parts = [part for part in split_parts(middle, lengths, settings.accumulate) if part]
    gradients = Gradients(model, course.objective, checkpoint=settings.gradient_checkpointing)
    course.optimizer.init(model.trainable_parameters())
    for _ in range(2):
        started = time.perf_counter()
        for part in parts:
            chosen = [examples[i] for i in part]
            unknown = [[0.0] * len(getattr(example, "scored", ())) for example in chosen]
            _, added, _ = gradients.of(course.objective.part(chosen, unknown, 0.0))
        course.optimizer.update(model, tree_map(lambda g, a: g.astype(a.dtype), added, model.trainable_parameters()))
        mx.eval(model.trainable_parameters(), course.optimizer.state)
    speed = int(lengths[middle].sum()) / (time.perf_counter() - started)
    return f"Time      about {duration_text(total / speed)} of training; {speed:,.0f} tok/s in one batch"
