"""phi3-mlx pretrain"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from .options import in_options
from .terminal import note, show
from .training import Chosen, TrainingCommand, TrainingLine, end_run, say_watchdog

if TYPE_CHECKING:
    from ..pretraining.settings import PretrainSettings


_PRETRAIN_NEEDS = {
    "config": "argument 'CONFIG'",
    "data": "option '-d' / '--data'",
    "output": "option '-o' / '--output'",
}


def _settings() -> type[PretrainSettings]:
    from ..pretraining.settings import PretrainSettings

    return PretrainSettings


def _pretrain(settings_file: str | None, resume: bool, dry_run: bool, force: bool, **given: Any) -> None:
    from ..pretraining import run
    from ..pretraining.settings import pretraining_from
    from ..tuning.stored import continued, read_stored

    kind = _settings()
    chosen = Chosen.of(kind, given, settings_file)
    if resume:
        stored = read_stored(chosen.resumed(), pretraining_from)
        settings = continued(stored, chosen.together, run.MAY_DIFFER, run.with_full_paths)
    else:
        settings = chosen.settings(kind, _PRETRAIN_NEEDS, dry_run=dry_run)
    command = click.get_current_context().command
    say_watchdog()
    if dry_run:
        from ..pretraining.dryrun import describe_pretraining

        prepared = run.prepare_pretraining(settings, fits=False)
        prepared = dataclasses.replace(prepared, way_out=in_options(prepared.way_out, command))
        show(describe_pretraining(prepared, force=force))
        return
    with TrainingLine() as progress:
        result = run.start_pretraining(
            settings,
            resume=resume,
            force=force,
            notify=lambda sentence: note(in_options(sentence, command)),
            on_step=progress.step,
            on_validation=progress.validated,
            on_sample=progress.sample,
        )
    end_run(result, progress.tokens, "pretrain")


pretrain = TrainingCommand(
    "pretrain",
    _settings,
    callback=_pretrain,
    moved="CONFIG and -d",
    argument="config",
    help="""Train a model from random weights on token shards.

    CONFIG is a config.json, a directory with one, or a model's name: its shape is taken, not its weights.

    \b
    phi3-mlx data tokenize notes -m tiny -o shards
    phi3-mlx pretrain tiny -d shards -o model --steps 200 --dry-run
    phi3-mlx pretrain tiny -d shards -o model --steps 200
    phi3-mlx generate -m model --raw -p "Once upon a time"

    Several folders have shares of the tokens (-d web=0.8 -d books=0.2), which a second phase may change
    (--phase2-data books=1). Ctrl-C, kill and a closed terminal save a checkpoint; --resume ends with the weights of an
    uninterrupted run. `mlx.launch -n 2 phi3-mlx pretrain ...` shares each batch among processes.
    """,
)
