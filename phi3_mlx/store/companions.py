"""The files that go along with config and weights, copied from one model directory to another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from .hub import COMPANIONS


def find_companions(directory: Path, patterns: Sequence[str] = COMPANIONS) -> dict[Path, Path]:
    """The files of a model directory that match: what they are called in it, and the regular file behind each.

    Raises CheckpointError for one that is not the model's own.
    """
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    return {file.relative_to(directory): _own_file(file, directory) for file in files if not file.is_dir()}


def copy_companions(directory: Path, to: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Copy what `find_companions` finds into the directory `to`. Raises CheckpointError and OSError."""
    for name, file in find_companions(directory, patterns).items():
        copy = to / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _own_file(file: Path, directory: Path) -> Path:
    """The regular file behind a name in a model's directory. CheckpointError if it is not the model's own.

    A link of whoever made the directory could lead to anything that the user can read, and the result may be published.
    Links may stay inside the directory, or lead from a snapshot of the hub's cache to the blobs of that repository.
    """
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(directory))
    repository = home.parent.parent
    places = [home]
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        places.append(repository / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{file} is a link to {real}, outside the model's directory, and is not copied; put the file itself there"
        )
    if not real.is_file():
        raise CheckpointError(f"{file} is not a regular file, or a link to none; remove it or put the file there")
    return real
