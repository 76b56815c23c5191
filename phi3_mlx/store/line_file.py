"""Lines of JSON that long work adds to: a process that is killed loses the line it was writing, no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fields import parse, shorten
from ..files import json_text, read_bytes
from .atomic import hold

_KIND_KEY, _FORMAT_KEY = "phi3_mlx", "format"  # keys of a first line, beside those of the run


class LineFile:
    """A file of JSON objects, one a line, to which lines are added; each outlives the process once `add` returns.

    `lines` are those of the file, and those added. The file is made with the first one. Raises DataError for a line
    that is none, except a last one without its end: its writer was killed, or the disk was full, and `add` writes over
    it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._whole = 0  # bytes of whole lines
        with disk_faults(path):
            data = read_bytes(path, most=None) if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self._whole += len(line)
            if line.strip():
                self.lines.append(object_of(line, path, number))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more line. Raises DataError where the disk is full or may not be written."""
        data = json_text(line).encode() + b"\n"
        with disk_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "r+b" if self.path.exists() else "xb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(data)
        self._whole += len(data)
        self.lines.append(dict(line))

    def begin(self, head: Mapping[str, Any], remedy: str) -> None:
        """Write `head`, the first line, or see that it is there, as `check_head` does."""
        if self.lines:
            check_head(self.path, self.lines[0], head, remedy)
        else:
            self.add(head)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """A directory, made if need be, that no other process writes into meanwhile. Raises DataError."""
    with disk_faults(directory), hold(directory) as mine:
        if not mine:
            raise DataError(f"another process writes into {directory}; wait for its end, or name another directory")
        yield


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """An OSError of the block as a DataError, which names the file."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{path} leads through a file, where a folder is needed; name another directory") from error
    except OSError as error:
        where = path if error.filename is None or isinstance(error.filename, int) else error.filename
        raise DataError(f"{where}: {error.strerror or error}; what was found before is kept") from error


def head_of(kind: str, version: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """A first line: what the lines behind it are, in which version of their format, and of which run."""
    head: dict[str, Any] = parse(json_text({_KIND_KEY: kind, _FORMAT_KEY: version, **identity}))
    return head


def check_head(path: Path, stored: Mapping[str, Any], head: Mapping[str, Any], remedy: str) -> None:
    """DataError where the first line of a file is not the one that this run would write: `head`, as `head_of` makes it.

    `remedy` says what to do about lines of another run.
    """
    if any(stored.get(name) != head[name] for name in (_KIND_KEY, _FORMAT_KEY)):
        raise damaged(path, "its first line is of another kind")
    if others := [_told(name, stored.get(name)) for name in {**head, **stored} if stored.get(name) != head.get(name)]:
        raise DataError(
            f"{path.parent} was begun with another {' and '.join(others)}; give the same again, or {remedy}"
        )


def _told(name: str, value: Any) -> str:
    """What is another now, and what it was; not of texts, most of which are digests."""
    return name if isinstance(value, str) else f"{name} (it was {shorten(value)})"


def damaged(path: Path, why: str) -> DataError:
    """What is wrong with a file of lines, and what to do."""
    return DataError(f"{path} is damaged: {why}; remove that line, or the file to begin anew")


def object_of(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The object that line `number` of a file holds. Raises DataError."""
    try:
        value = parse(line.decode())
    except ValueError as error:
        raise damaged(path, f"line {number:,} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"line {number:,} is no JSON object")
    return value
