"""The settings of a run that goes on, as its folder keeps them, and paths that hold from any working folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import CheckpointError, OptionError, TrainingError
from ..fields import Fields
from ..paths import absolute_path
from ..store import hub
from ..values import shown
from .folder import RUN
from .run_settings import S
from .settings import Settings, from_stored


def stored_settings(output: Path) -> Settings:
    """The settings of the fine-tuning in a folder. Raises TrainingError."""
    return read_stored(output, from_stored)


def read_stored(output: Path, read: Callable[[Mapping[str, Any], str], S]) -> S:
    """The settings of the run in a folder, by what `read` makes of those in run.json. Raises TrainingError."""
    try:
        stored = Fields(read_json(output / RUN), output / RUN, TrainingError)
        return read(stored.fields("settings").raw, str(output / RUN))
    except CheckpointError as error:
        why = f" ({error})" if (output / RUN).is_file() else ""
        raise TrainingError(f"{output} holds no run to go on with{why}; begin one without resume=True") from error


def check_paths(settings: Settings) -> None:
    """TrainingError for a path of a run that was moved since, or whose model or data were."""
    for name in ("model", "data", "valid", "from_adapter"):
        path = getattr(settings, name)
        if path and os.path.isabs(path) and not os.path.exists(path):
            raise TrainingError(f"{path}, the {name} of this run, is not there; say where it is now with {name}=PATH")


def at_its_commit(settings: Settings, output: Path) -> Settings:
    """The settings of a run that goes on, its repository at the commit with which it began: a branch may move on."""
    if settings.revision is not None or not hub.is_repository(settings.model):
        return settings
    began = Fields(read_json(output / RUN), output / RUN, TrainingError).fields("base_model").raw
    name, commit = began.get("name"), began.get("revision")
    if not isinstance(name, str) or hub.repository_of(name) != hub.repository_of(settings.model):
        return settings
    return dataclasses.replace(settings, revision=commit) if isinstance(commit, str) else settings


def absolute(settings: Settings) -> Settings:
    """Paths made independent of the working folder, so that a run can be resumed from another."""
    paths: dict[str, Any] = {
        name: absolute_path(v) for name in ("data", "valid", "output", "from_adapter") if (v := getattr(settings, name))
    }
    model = settings.model
    if os.path.isdir(os.path.expanduser(model)) and model.lower() != "tiny" and not hub.is_repository(model):
        paths["model"] = absolute_path(settings.model)
    return dataclasses.replace(settings, **paths)


def continued(stored: S, given: Mapping[str, Any], may_differ: Collection[str], absolute: Callable[[S], S]) -> S:
    """The settings `stored` of a run that goes on; `given` may say where things are now, and nothing else anew.

    `absolute` gives paths the form in which run.json has them. Raises OptionError.
    """
    settings = dataclasses.replace(stored, **given)
    before, now = absolute(stored), absolute(settings)
    changed = next((n for n in given if n not in may_differ and getattr(now, n) != getattr(before, n)), None)
    if changed is not None:
        raise OptionError(
            f"--resume uses the settings of the run, and {changed} was {shown(getattr(stored, changed))}; leave it "
            "out, or start over with another -o"
        )
    return settings
