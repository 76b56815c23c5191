"""Files and directories that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError

_SUFFIX = ".partial"
_PREVIOUS = "previous"  # where a replaced directory waits, on file systems that cannot swap two names


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends without an error.

    It is a hidden sibling until then, and removed if the block fails. Raises OSError.
    """
    folder, name = os.path.split(os.fspath(path))
    beside = Path(folder, f".{name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
        sync(beside)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place in one step: a run killed meanwhile leaves the old one."""
    with new_file(path) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Have the disk hold the bytes of a file, or of every file in a directory."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def new_directory(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """An empty directory to fill with files, which becomes `destination` when the block ends without an error.

    It is a hidden sibling of `destination` until then; what killed processes left there is removed. `force` replaces
    a model directory that is there already, in one step. Raises CheckpointError: something is there already, or
    nothing can be written there (also for an OSError inside the block).
    """
    destination = Path(os.path.realpath(destination))
    check_destination(destination, force=force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        with _partial(destination) as folder:
            unfinished = folder / destination.name
            unfinished.mkdir()
            yield unfinished
            sync(unfinished)
            _put(unfinished, destination, folder, force)
    except OSError as error:
        why = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            why = f"{error.filename} is not a directory"
        raise CheckpointError(f"{destination} cannot be written: {why}; name another place") from error


def check_destination(destination: Path, *, force: bool = False) -> None:
    """CheckpointError unless a model directory may be written there."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise CheckpointError(f"{destination} exists already; name another directory, or replace it with --force")
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is not a directory, and --force replaces only one; name another place")
    if any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise CheckpointError(
            f"{destination} holds something else than a model (no config.json), which --force does not replace; name "
            "another directory"
        )


@contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    """A hidden sibling, locked while this process lives, removed in the end."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=_SUFFIX, dir=destination.parent))
        lock = os.open(folder, os.O_RDONLY)
        # Another run may have swept it away before it was locked. (Where nothing can be locked, nothing is swept.)
        if _locked(lock, otherwise=True) and folder.exists():
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(destination: Path) -> None:
    """Remove what dead runs left beside `destination`: no process holds its lock any more."""
    ours = re.compile(rf"\.{re.escape(destination.name)}\.[^.]+{re.escape(_SUFFIX)}")  # no other name that begins so
    for folder in [path for path in destination.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                if _locked(lock, otherwise=False):
                    if (folder / _PREVIOUS).exists() and not destination.exists():
                        (folder / _PREVIOUS).rename(destination)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(descriptor: int, *, otherwise: bool) -> bool:
    """Lock an open directory; False if another process has, `otherwise` on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True


def _put(unfinished: Path, destination: Path, folder: Path, force: bool) -> None:
    if not destination.exists():
        unfinished.rename(destination)
        return
    check_destination(destination, force=force)  # somebody else may have written there meanwhile
    if _exchange(unfinished, destination):
        return
    previous = folder / _PREVIOUS
    destination.rename(previous)
    try:
        unfinished.rename(destination)
    except BaseException:
        previous.rename(destination)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot (renameat2(2), renamex_np(2))."""
    system = ctypes.CDLL(None)
    a, b, swap = os.fsencode(first), os.fsencode(second), 2
    if sys.platform == "darwin":
        return hasattr(system, "renamex_np") and system.renamex_np(a, b, swap) == 0
    here = -100  # AT_FDCWD
    return hasattr(system, "renameat2") and system.renameat2(here, a, here, b, swap) == 0
