"""The folder beside a model in the making that keeps what a long run has done, until the model is there.

    DST.unfinished/   own_text.json   key.json   fitted/   packed/   teacher.safetensors   checkpoint.safetensors

The same command goes on from there. A text of the source's own has a key of its own: bits may be fitted to it first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ..config import read_json
from ..errors import OptionError
from ..files import json_text
from ..store.atomic import FINDER, hold, is_partial, replace_file

OWN_TEXT_FILE, FITTED, PACKED, TEACHER, CHECKPOINT = (
    "own_text.json", "fitted", "packed", "teacher.safetensors", "checkpoint.safetensors"
)  # fmt: skip
_RUN_KEY = "key.json"


def unfinished_for(method: str, destination: Path) -> AbstractContextManager[Path | None]:
    """`unfinished` for a method whose run goes on where it was cut; None for the others."""
    return unfinished(destination) if method != "round" else nullcontext()


def unfinished_place(destination: Path) -> Path:
    """Where a run that writes `destination` keeps what it has done."""
    place = Path(os.path.realpath(destination))
    return place.with_name(f"{place.name}.unfinished")


@contextmanager
def unfinished(destination: Path) -> Iterator[Path]:
    """The folder of what a run has done so far, which is removed when the block ends without an error.

    OptionError where another run works there, or where that name is of a folder of somebody's own.
    """
    folder = unfinished_place(destination)
    with hold(folder) as alone:
        if not alone:
            raise OptionError(f"another run is writing {destination}; wait for it, or name another directory")
        _check_ours(folder)
        try:
            yield folder
        except BaseException:
            if not _holds(folder, FITTED, PACKED, OWN_TEXT_FILE):  # nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def left_to_keep(folder: Path | None, nbytes: int) -> int:
    """How many bytes a run may still put into its folder, which takes about what its model of `nbytes` does."""
    if folder is None:
        return 0
    return max(0, nbytes - sum(file.stat().st_size for file in folder.rglob("*.safetensors")))


def _check_ours(folder: Path) -> None:
    """OptionError where a folder, which this run empties and removes, holds what no run writes."""
    ours = (_RUN_KEY, OWN_TEXT_FILE, FITTED, PACKED, TEACHER, CHECKPOINT, FINDER)
    strange = next((path.name for path in folder.iterdir() if path.name not in ours and not is_partial(path)), None)
    if strange is not None:
        raise OptionError(f"{folder} is for an unfinished run, and holds {strange}; move that away")


def claim(folder: Path, key: str, force: bool) -> None:
    """Empty `folder`, unless it is of a run with this key. OptionError for another run's that has done a step, unless
    `force`.

    The source's own text stays: who made it has looked at its key.
    """
    path = folder / _RUN_KEY
    before = read_json(path).get("key") if path.exists() else None
    if before == key:
        return
    if before is not None and _holds(folder, FITTED, PACKED) and not force:
        raise other_run(folder)
    for old in folder.iterdir():
        if old.name != OWN_TEXT_FILE:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    replace_file(path, json_text({"key": key}).encode())


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def other_run(folder: Path) -> OptionError:
    """What to say where a folder is of a run with other arguments."""
    return OptionError(
        f"{folder} is of a run with other arguments; give them again, remove it, or start over with force=True"
    )
