"""Atomic writes: a file or directory appears whole or not at all, even if the process that writes it is killed.

It is written into a hidden directory beside its place, `.phi3-mlx-....partial`, which is locked while its writer lives.
Once all of it is on the disk it is renamed into its place. The next writer there removes what dead writers left. Links
are followed and stay links; no pipe, device or directory is ever replaced by a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, OptionError, Phi3Error

_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".phi3-mlx-", ".partial"
_PARTIAL = re.compile(rf"{re.escape(_PARTIAL_PREFIX)}[^/]+{re.escape(_PARTIAL_SUFFIX)}")
_NEW, _OLD = "new", "old"  # in a hidden directory: what is written and, where names cannot be swapped, what it replaces
FINDER = ".DS_Store"  # macOS writes it into every folder that is looked at
_HIDDEN_PATH = re.compile(rf"/{_PARTIAL.pattern}(/{_NEW})?")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends without an error.

    Raises OSError, as `check_file` does, and if writing fails.
    """
    place = _place(path)
    with named(path), _partial(place.parent) as hidden:
        unfinished = hidden / _NEW / place.name
        with unfinished.open("wb") as file:
            yield file
        _put_files([unfinished], hidden / _NEW, place.parent)


@contextmanager
def new_files(directory: Path, last: str) -> Iterator[Path]:
    """An empty directory to fill with files, which move into `directory` once all of them are on the disk.

    A new directory appears with its files in one step. In an existing one each file replaces the one of its name, in
    folders too, `last` after the others as the sign that all are there, and files of other names stay. Raises OSError.
    """
    directory = Path(os.path.realpath(directory))
    if not os.path.lexists(directory):
        with named(directory), _whole_directory(directory, lambda: None) as folder:
            yield folder
        return
    with named(directory), _partial(directory) as hidden:
        yield hidden / _NEW
        files = [path for path in (hidden / _NEW).rglob("*") if path.is_file()]
        _put_files(sorted(files, key=lambda file: file == hidden / _NEW / last), hidden / _NEW, directory)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put a file in place in one step: a run killed before that leaves the old one. Raises OSError."""
    with new_file(path) as file:
        file.write(content)


def check_file(path: str | os.PathLike[str]) -> None:
    """OSError if `new_file` could not write there: no such folder, no permission, or no regular file is there."""
    place = _place(path)
    with named(path):
        if not os.access(place.parent, os.W_OK):
            os.stat(place.parent)  # FileNotFoundError if there is no such folder
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def new_directory(
    destination: Path,
    *,
    force: bool | None = None,
    mark: str = "config.json",
    fault: type[Phi3Error] = CheckpointError,
    way_out: str | None = None,
) -> Iterator[Path]:
    """An empty directory to fill with files, which becomes `destination` when the block ends without an error.

    `force` and `mark` are `check_destination`'s. Raises `fault` if something is there already or nothing can be written
    there, also for an OSError inside the block; its message ends with `way_out`, by default to name another place.
    """
    destination = Path(os.path.realpath(destination))

    def check() -> None:
        check_destination(destination, force=force, mark=mark, fault=fault)

    check()
    try:
        with named(destination), _whole_directory(destination, check) as folder:
            yield folder
    except OSError as error:
        file = "" if error.filename == str(destination) else f" ({error.filename})"
        why = f"{error.strerror or error}{file}"
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            why = f"{error.filename} is not a directory"
        if way_out is None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            way_out = f"{'free some space, or ' if full else ''}name another place"
        raise fault(f"{destination} cannot be written: {why}; {way_out}") from error


def check_destination(
    destination: Path,
    *,
    force: bool | None = None,
    mark: str = "config.json",
    fault: type[Phi3Error] = CheckpointError,
) -> None:
    """Raise `fault` unless a directory may be written there: nothing exists, or an empty directory.

    With `force` it may replace a directory that holds the file `mark`, a model's by default. None: there is no such
    option to name in the message.
    """
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        why = ", and force=True replaces only one" if force else ""
        raise fault(f"{destination} is not a directory{why}; name another place")
    if os.path.samefile(destination, os.curdir):
        raise fault(f"{destination} is the directory you are in; name one in it, which will be made")
    if os.path.ismount(destination):
        raise fault(f"{destination} is where a disk is mounted; name a directory in it")
    if all(path.name == FINDER for path in destination.iterdir()):
        return
    if not force:
        option = "" if force is None else ", or replace it with force=True"
        raise fault(f"{destination} exists already; name another directory{option}")
    if not (destination / mark).is_file():
        raise fault(
            f"{destination} holds something else than a model (no {mark}), which force=True does not replace; name "
            "another directory"
        )


def check_apart(destination: Path, read: Path, what: str) -> None:
    """OptionError where a directory to write is, or holds, what is `read`, which messages call `what`."""
    real, target = Path(os.path.realpath(read)), Path(os.path.realpath(destination))
    if target == real or target in real.parents:
        raise OptionError(f"{destination} is, or holds, {what} that is read; name another directory")


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Lock `directory`, which is made if need be, for this block; False if another run holds it. Raises OSError.

    The lock ends with the process, however that ends. On file systems without locks it is always True.
    """
    directory = Path(os.path.realpath(directory))  # a link may lead to a directory that does not exist yet
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # somebody else removed it
            continue
        mine = _locked(lock, otherwise=True)
        if not mine or (directory.exists() and os.path.samestat(os.fstat(lock), os.stat(directory))):
            break
        os.close(lock)
    try:
        yield mine
    finally:
        os.close(lock)


def is_partial(path: Path) -> bool:
    """Whether a name is that of a hidden directory of this module."""
    return _PARTIAL.fullmatch(path.name) is not None


def _place(path: str | os.PathLike[str]) -> Path:
    """The place of a file `path`, links followed. Raises OSError if what is there may not be replaced."""
    with named(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return Path(os.path.realpath(path))  # of a link that leads to nothing, where it leads
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise FileExistsError(errno.EEXIST, f"{kind} is there, which no file replaces")
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return Path(os.path.realpath(path))


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the block names `path` if it names no file (as for a full disk), and never a hidden directory."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(path if error.filename is None or isinstance(error.filename, int) else error.filename)
        error.filename = _HIDDEN_PATH.sub("", name)
        if error.filename2 is not None:
            del error.filename2  # of a rename
        raise


@contextmanager
def _whole_directory(destination: Path, check: Callable[[], None]) -> Iterator[Path]:
    """An empty directory that becomes `destination`; `check` is called before it replaces another."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _partial(destination.parent) as hidden:
        unfinished = hidden / _NEW / destination.name
        unfinished.mkdir()
        yield unfinished
        _sync(unfinished)
        _put(unfinished, destination, hidden, check)
        _sync_names(destination.parent)


def _put_files(files: list[Path], root: Path, directory: Path) -> None:
    """Rename complete files of `root` into `directory`; they take the permissions of those that they replace."""
    for file in files:
        _sync(file)
    places = []
    for file in files:
        wanted = directory / file.relative_to(root)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        places.append(_place(wanted))  # again: time has passed
    for file, place in zip(files, places, strict=True):
        if place.exists():
            with contextlib.suppress(OSError):  # not every file system has permissions
                file.chmod(stat.S_IMODE(place.stat().st_mode))
    for file, place in zip(files, places, strict=True):
        file.replace(place)
    for folder in {directory, *(place.parent for place in places)}:
        _sync_names(folder)


@contextmanager
def _partial(parent: Path) -> Iterator[Path]:
    """A hidden directory in `parent`, locked while this process lives, and removed in the end."""
    _sweep(parent)
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, suffix=_PARTIAL_SUFFIX, dir=parent))
        try:
            lock = os.open(hidden, os.O_RDONLY)
        except FileNotFoundError:  # another run swept it away before it was locked
            continue
        if _locked(lock, otherwise=True) and hidden.exists():
            break
        os.close(lock)
    try:
        (hidden / _NEW).mkdir()
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove hidden directories of dead runs, which hold no lock, from `parent`; restore what those had moved away."""
    with os.scandir(parent) as entries:
        left = [Path(entry.path) for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for hidden in left:
        with contextlib.suppress(OSError):
            lock = os.open(hidden, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _locked(lock, otherwise=False):  # where nothing can be locked, nothing is swept
                    for old in (hidden / _OLD).iterdir() if (hidden / _OLD).exists() else ():
                        if not os.path.lexists(parent / old.name):
                            old.rename(parent / old.name)
                    shutil.rmtree(hidden, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(descriptor: int, *, otherwise: bool) -> bool:
    """Lock an open directory; False if another process holds it, `otherwise` on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True


def _put(unfinished: Path, destination: Path, hidden: Path, check: Callable[[], None]) -> None:
    if not os.path.lexists(destination):
        unfinished.rename(destination)
        return
    check()  # somebody else may have written there since
    if _exchange(unfinished, destination):
        return
    (hidden / _OLD).mkdir()
    previous = hidden / _OLD / destination.name
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


def _sync(path: Path) -> None:
    """Flush a file, or every file in a directory, to the disk."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    if path.is_dir():
        _sync_names(path)


def _sync_names(directory: Path) -> None:
    """Flush the names in a directory to the disk, if the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
