"""phi3-mlx tune"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from .measuring import EVALUATION, TASKS, Cost
from .options import ModelOptions, in_options
from .terminal import note, show
from .training import Chosen, TrainingCommand, TrainingLine, end_run, say_watchdog

if TYPE_CHECKING:
    from ..tuning.execution import Result
    from ..tuning.settings import Settings


_TUNE_NEEDS = {"data": "option '-d' / '--data'", "output": "option '-o' / '--output'"}


def _settings() -> type[Settings]:
    from ..tuning.settings import Settings

    return Settings


def _tune(settings_file: str | None, resume: bool, tasks: str | None, dry_run: bool, force: bool, **given: Any) -> None:
    from ..tuning import run
    from ..tuning.stored import absolute, continued, stored_settings

    kind = _settings()
    chosen = Chosen.of(kind, given, settings_file)
    if resume:
        settings = continued(stored_settings(chosen.resumed()), chosen.together, run.FREE, absolute)
    else:
        settings = chosen.settings(kind, _TUNE_NEEDS, dry_run=dry_run)
    command = click.get_current_context().command
    notify = lambda sentence: note(in_options(sentence, command))  # noqa: E731
    say_watchdog()
    if dry_run:
        from ..tuning.dryrun import STYLES, describe_run

        prepared = run.prepare(settings, fits=False, resume=resume)
        notes, way_out = [in_options(note, command) for note in prepared.notes], in_options(prepared.way_out, command)
        prepared = dataclasses.replace(prepared, notes=tuple(notes), way_out=way_out)
        show(describe_run(prepared, color=sys.stdout.isatty(), force=force), styles=STYLES)
        return
    cost = None if tasks is None else Cost(tasks)
    with TrainingLine() as progress:

        def measure(ended: Result) -> None:
            progress.close()
            base = ModelOptions(settings.model, settings.revision)
            tuned = dataclasses.replace(base, adapter=(str(ended.output),))
            assert cost is not None
            cost.of(base, tuned, ended.output / f"{EVALUATION}-{ended.step}")

        result = run.start(
            settings,
            resume=resume,
            force=force,
            notify=notify,
            on_step=progress.step,
            on_validation=progress.validated,
            on_sample=progress.sample,
            measure=measure if cost else None,
            on_reference=progress.reference,
        )
    end_run(result, progress.tokens, "tune")


tune = TrainingCommand(
    "tune",
    _settings,
    callback=_tune,
    moved="-m, -d and --valid",
    more=[click.Option(["--tasks"], **TASKS)],
    help="""Fine-tune a model on your examples: LoRA (on packed weights too), DoRA, or all weights.

    \b
    phi3-mlx tune -m phi-3.5-mini-4bit -d my.jsonl -o adapter --dry-run
    phi3-mlx tune -m phi-3.5-mini-4bit -d my.jsonl -o adapter
    phi3-mlx generate -m phi-3.5-mini-4bit --adapter adapter -p "..."

    A line of my.jsonl is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. With --objective
    dpo, orpo or simpo it is {"prompt": ..., "chosen": ..., "rejected": ...}, and with kto {"prompt": ...,
    "completion": ..., "label": true or false}. Ctrl-C, kill and a closed terminal save a checkpoint; --resume ends
    with the weights of an uninterrupted run.
    """,
)
