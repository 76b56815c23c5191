"""The settings of a run that goes on, as its folder keeps them, and paths that hold from any working folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import CheckpointError, TrainingError
from ..fields import Fields
from ..store import hub
from .folder import RUN
from .settings import Settings, from_stored


def stored_settings(output: Path) -> Settings:
    """The settings of the run in a folder. Raises TrainingError."""
    try:
        stored = Fields(read_json(output / RUN), output / RUN, TrainingError)
        return from_stored(stored.fields("settings").raw, str(output / RUN))
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
    paths = {
        name: os.path.abspath(os.path.expanduser(v))
        for name in ("data", "valid", "output", "from_adapter")
        if (v := getattr(settings, name))
    }
    model = settings.model
    if os.path.isdir(os.path.expanduser(model)) and model.lower() != "tiny" and not hub.is_repository(model):
        paths["model"] = os.path.abspath(os.path.expanduser(settings.model))
    return dataclasses.replace(settings, **paths)


def comparable(settings: Settings, name: str) -> Any:
    """A setting in the form in which run.json keeps it."""
    return getattr(absolute(settings), name)
