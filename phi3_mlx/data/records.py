"""Records with their texts, out of files of any kind, one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import DataError, OptionError
from ..fields import kind_of, shorten
from ..tuning.pairs import read_pair
from ..tuning.rows import read_row
from ..values import check_function, listed, path, refusal, shown
from .formats import DataFile, DataLine, OpenData, data_files
from .options import ReadOptions

ADVANCE_EVERY = 0.1  # seconds between two reports of progress
_BROKEN_SHOWN = 20
_KEYS_OF_TALK = (
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "system", "tools",
)  # fmt: skip
DataPath = str | os.PathLike[str]


@dataclass(frozen=True)
class DataRecord:
    """A record: where it stands ("file:line"), its value, what is looked at of it, and its JSON as it was read."""

    source: str
    value: dict[str, Any]
    text: str
    line: bytes


class Broken(NamedTuple):
    """A record that could not be read."""

    source: str
    why: str


class Advance(NamedTuple):
    """How far a step is, in bytes of the files; a `ProgressBar` takes it. `total` leaves out pipes."""

    stage: str
    done: int
    total: int
    records: int
    unit: str = "bytes"


OnAdvance = Callable[[Advance], None]


class Records:
    """The records of files and folders, read anew each time it is iterated.

    `name` is what messages call the inputs. `text_of` takes another text out of a record than `text_in`. `read` counts
    records by file, `broken` are those left out with `skip_broken`. Raises OptionError for what names no files, and
    DataError, which names the file and the line, for a record that cannot be read, and for inputs without any unless
    they `may_be_empty`.
    """

    def __init__(
        self,
        inputs: DataPath | Sequence[DataPath],
        options: ReadOptions,
        stage: str,
        progress: OnAdvance | None,
        text_of: Callable[[dict[str, Any], str | None], str] | None = None,
        *,
        name: str = "inputs",
        may_be_empty: bool = False,
    ):
        check_function(progress, "progress")
        paths = [os.path.expanduser(given) for given in _paths(inputs, name)]
        if not paths:
            raise DataError("there is nothing to read; name files or folders of records")
        self.files: list[DataFile] = [file for path in paths for file in data_files(path)]
        _check_files(self.files)
        self.read: dict[str, int] = {}
        self.broken: list[Broken] = []
        self.broken_count = 0
        self._options, self._stage, self._progress = options, stage, progress
        self._text_of, self._may_be_empty = text_of or text_in, may_be_empty

    def __iter__(self) -> Iterator[DataRecord]:
        total, before, count = sum(file.size for file in self.files), 0, 0
        told = time.monotonic()
        for file in self.files:
            self.read.setdefault(file.name, 0)
            opened = OpenData(file)
            try:
                for piece in opened.pieces(lines=self._options.lines):
                    record = self._record(piece)
                    if record is not None:
                        self.read[file.name] += 1
                        yield record
                    count += 1
                    if self._progress and time.monotonic() - told >= ADVANCE_EVERY:
                        told = time.monotonic()
                        self._progress(Advance(self._stage, min(total, before + opened.position), total, count))
            finally:
                opened.close()
            before += file.size
        if not count and not self._may_be_empty:
            raise DataError(f"{', '.join(file.name for file in self.files)[:200]}: no records; give one a line")
        if self._progress:
            self._progress(Advance(self._stage, total, total, count))

    def take(self, read: Mapping[str, int], broken: Sequence[Broken], broken_count: int) -> None:
        """Count what was read of some of the files elsewhere, in their order."""
        self.read.update(read)
        self.broken = [*self.broken, *broken][:_BROKEN_SHOWN]
        self.broken_count += broken_count

    def _record(self, piece: DataLine) -> DataRecord | None:
        fault = piece.fault
        if not fault:
            try:
                return DataRecord(
                    piece.source, piece.value, self._text_of(piece.value, self._options.field), piece.line
                )
            except DataError as error:
                fault = str(error)
        if not self._options.skip_broken:
            raise DataError(f"{piece.source}: {fault}; skip_broken=True leaves such records out")
        self.broken_count += 1
        if len(self.broken) < _BROKEN_SHOWN:
            self.broken.append(Broken(piece.source, fault))
        return None


def _paths(given: Any, name: str) -> list[str]:
    """Names of files and folders, of one or several. OptionError for anything else."""
    several = [given] if isinstance(given, (str, os.PathLike)) else listed(given)
    if several is None:
        raise refusal(given, name, "names of files or folders")
    for item in several:
        if item == "" or not isinstance(item, (str, os.PathLike)):
            raise OptionError(f"{name} holds {shown(item)}; expected names of files or folders")
    return [path(item, name) for item in several]


def _check_files(files: Sequence[DataFile]) -> None:
    """DataError for a file that is not there, or there twice, also by another name: before long work, not within."""
    names: dict[str, str] = {}
    for file in files:
        if file.path != "-":
            try:
                os.stat(file.path)
            except OSError as error:
                raise DataError(f"{file.path} cannot be read: {error.strerror}; name a readable file") from error
        place = os.path.realpath(file.path) if file.is_regular else file.path
        if place in names:
            twice = "given twice" if names[place] == file.name else f"the same file as {names[place]}"
            raise DataError(f"{file.name} is {twice}; give it once")
        names[place] = file.name


def text_in(value: dict[str, Any], field: str | None) -> str:
    """The text of a record: its `field`, or "text", or what is said in a training example, a message a paragraph.

    Of a preference that is the prompt, the better answer, the worse one. DataError, without the source, where there is
    none.
    """
    name = "text" if field is None else field
    if keys_of_text(value, field) != [name]:
        try:
            messages = _said_in_pair(value) if is_pair(value) else read_row(value, "", {}).messages or ()
        except DataError as error:
            raise DataError(f"{error}, or the field that holds the text") from None
        return _checked("\n\n".join(message["content"] for message in messages), "the text")
    if name not in value:
        raise DataError(f"has no key {shorten(name)}; its keys are {', '.join(map(shorten, [*value][:8])) or 'none'}")
    if not isinstance(value[name], str):
        raise DataError(f"{shorten(name)} is {kind_of(value[name])}; expected a text")
    return _checked(value[name], shorten(name))


def keys_of_text(value: dict[str, Any], field: str | None) -> list[str]:
    """Under which keys of a record its text is: one, or those of a conversation."""
    name = "text" if field is None else field
    is_text = field is not None or value.get(name) is not None  # null counts as absent, as in training
    return [name] if is_text else [key for key in _KEYS_OF_TALK if key in value]


def is_pair(value: dict[str, Any]) -> bool:
    """Whether a record is a preference of one answer over another."""
    keys = {key for key, part in value.items() if part is not None}
    return keys >= {"chosen", "rejected"} and "text" not in keys


def _said_in_pair(value: dict[str, Any]) -> Sequence[dict[str, Any]]:
    pair = read_pair(value, "", {})
    chosen, rejected = (record.messages or () for record in (pair.chosen, pair.rejected))
    shorter = min(len(chosen), len(rejected))
    same = next((n for n in range(shorter) if chosen[n] != rejected[n]), shorter)
    return [*chosen, *rejected[same:]]


def _checked(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has half a character (a lone surrogate at {error.start + 1})") from None
    return text
