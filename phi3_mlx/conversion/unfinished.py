"""The folder beside a model in the making that keeps what a long run has done, until the model is there.

    DST.unfinished/   own_text.json   key.json   fitted/   packed/   teacher.safetensors   checkpoint.safetensors

The same command goes on from there. A text of the source's own has a key of its own: bits may be fitted to it first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import __version__
from ..config import read_json
from ..errors import CheckpointError, OptionError
from ..files import json_text
from ..store.atomic import FINDER, hold, is_partial, replace_file

if TYPE_CHECKING:
    from .layout import Layout
    from .sources import Source

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

    OptionError where another run works there, or where that name is of a folder of somebody's own. CheckpointError
    where no folder can be made.
    """
    folder = unfinished_place(destination)
    with ExitStack() as stack:
        try:
            alone = stack.enter_context(hold(folder))
        except OSError as error:
            why = f"{error.strerror} ({folder}, to keep what is done)"
            raise CheckpointError(f"{destination} cannot be written: {why}; name another place") from error
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


@dataclass(frozen=True)
class DiskUse:
    """Bytes of the disk that a run takes for what it keeps: the `model`, fitted or packed, the `text` behind the last
    layer, the source's distributions (`teacher`) and a `checkpoint` of the training.
    """

    model: int
    text: int
    teacher: int = 0
    checkpoint: int = 0

    def most(self, *, packed: bool) -> int:
        """All that is there at once, `packed` or before that. A text and a checkpoint are replaced by whole ones."""
        return self.model + self.teacher + 2 * max(0 if packed else self.text, self.checkpoint)


def left_to_keep(folder: Path | None, kept: DiskUse) -> int:
    """How many bytes a run may still put into its folder."""
    if folder is None:
        return 0
    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return max(0, kept.most(packed=_holds(folder, PACKED)) - there)


def _check_ours(folder: Path) -> None:
    """OptionError where a folder, which this run empties and removes, holds what no run writes."""
    ours = (_RUN_KEY, OWN_TEXT_FILE, FITTED, PACKED, TEACHER, CHECKPOINT, FINDER)
    strange = next((path.name for path in folder.iterdir() if path.name not in ours and not is_partial(path)), None)
    if strange is not None:
        raise OptionError(f"{folder} is for an unfinished run, and holds {strange}; move that away")


def claim(folder: Path, key: str, force: bool, *, name: Literal["asked", "key"] = "key") -> None:
    """Empty `folder`, unless it is of a run with this key. OptionError for another run's that has done a step, unless
    `force`.

    `name`: a run has two keys. What was "asked" is known before hours of writing a text and of measuring bits, on whose
    results the other depends, too.

    The source's own text stays: who made it has looked at its key.
    """
    path = folder / _RUN_KEY
    keys = read_json(path) if path.exists() else {}
    before = keys.pop(name, None)
    if before == key:
        return
    if before is not None and _holds(folder, FITTED, PACKED) and not force:
        raise other_run(folder)
    if before is not None or name == "key":
        keys.pop("key", None)  # of what goes now
        for old in folder.iterdir():
            if old.name != OWN_TEXT_FILE:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    replace_file(path, json_text({**keys, name: key}).encode())


def asked_digest(source: Source, layout: Layout, method: str, text: Sequence[str | int], target: Any = None) -> str:
    """The key of what was asked; `text` and `target`, as JSON, tell one text and one size from another."""
    kinds = [(name, tensor.dtype) for name, tensor in source.tensors.items()]
    return hashlib.sha256(json.dumps([__version__, kinds, layout.recipe, method, text, target]).encode()).hexdigest()


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def other_run(folder: Path) -> OptionError:
    """What to say where a folder is of a run with other arguments."""
    return OptionError(
        f"{folder} is of a run with other arguments; give them again, remove it, or start over with force=True"
    )
