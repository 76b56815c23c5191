"""Files of records, however they are written: JSON lines, text and Parquet; gzip and Zstandard; pipes.

One record is in memory at a time (of Parquet a batch), and none longer than `LONGEST`.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, OptionError
from ..fields import kind_of, parse
from ..files import LARGEST, decode, encoding_of, json_text, not_unicode, open_file, read_up_to

LONGEST = LARGEST  # bytes of a record
_JSON_LINES, _TEXTS, _PARQUET = (".jsonl", ".ndjson"), (".txt", ".md"), (".parquet",)
_COMPRESSED = (".gz", ".zst")
DATA_REPORT = "report.json"  # of a step, beside the records that it kept
REMOVED = "removed.jsonl"  # what a step left out: no input of the next one
_CHUNK = 4096  # bytes of Zstandard at once: at its highest ratio, 2**15, these are 128 MB of text
_BATCH = 256  # rows of Parquet


@dataclass(frozen=True)
class DataLine:
    """A record, or (fault) why there is none. `line` is its JSON without a line end."""

    source: str  # "file:line"
    value: dict[str, Any]
    line: bytes
    fault: str = ""


@dataclass(frozen=True)
class DataFile:
    """A file of records: its path ("-" is stdin), what it holds, and how that is compressed."""

    path: str
    kind: str  # ".jsonl", ".txt" or ".parquet"
    compression: str = ""  # ".gz", ".zst"

    @property
    def name(self) -> str:
        return "stdin" if self.path == "-" else self.path

    @property
    def is_regular(self) -> bool:
        """Whether it can be read twice."""
        return self.path != "-" and os.path.isfile(self.path)

    @property
    def size(self) -> int:
        """Bytes on disk; 0 of a pipe."""
        return os.path.getsize(self.path) if self.is_regular else 0


def data_file(path: str) -> DataFile:
    """What a path's ending says of the file. JSON lines come through a pipe. DataError for another ending."""
    if known := _by_ending(path):
        return known
    if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        return DataFile(path, _JSON_LINES[0])
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist; name files or folders of records")
    raise DataError(f"{path} is of no known kind; give .jsonl, .txt or .md, each perhaps with .gz or .zst, or .parquet")


def _by_ending(path: str) -> DataFile | None:
    name = path.lower()
    compression = next((end for end in _COMPRESSED if name.endswith(end)), "")
    inner = name.removesuffix(compression)
    for ends in (_JSON_LINES, _TEXTS, _PARQUET):
        if inner.endswith(ends) and not (compression and ends is _PARQUET):
            return DataFile(path, ends[0], compression)
    return None


def data_files(path: str) -> list[DataFile]:
    """The files of records in a folder, also in folders in it, sorted by name; or a single file.

    Links are followed. DataError for a folder that cannot be read.
    """
    if path == "-" or not os.path.isdir(path):
        return [data_file(path)]
    names = sorted(_files_in(path))
    files = [file for inner in names if not _is_left_out(inner) and (file := _by_ending(str(inner)))]
    if not files:
        raise DataError(f"{path} holds no records; put .jsonl, .txt, .md or .parquet files there")
    return files


def _files_in(folder: str) -> Iterator[Path]:
    """What is no folder, in a folder and those in it; each folder once, whatever links lead there."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; name readable files or folders")

    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        new = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                new.append(name)
        folders[:] = new
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_left_out(file: Path) -> bool:
    """Whether a step removed these records."""
    return file.name == REMOVED and (file.parent / DATA_REPORT).exists()


class OpenData:
    """An open file of records. `position` is how many of the bytes on disk were read."""

    def __init__(self, file: DataFile):
        self._file, self._raw = file, _opened(file)

    def close(self) -> None:
        if self._file.path != "-":
            self._raw.close()

    @property
    def position(self) -> int:
        return self._raw.tell() if self._raw.seekable() else 0

    def pieces(self, *, lines: bool) -> Iterator[DataLine]:
        """The records in their order. DataError for a file that is damaged, or no Unicode."""
        with self._faults():
            if self._file.kind == ".parquet":
                yield from _of_parquet(self._raw, self._file.name)
                return
            data = _decompressed(self._raw, self._file)
            if self._file.kind == ".txt" and not lines:
                yield from self._whole(data)
            else:
                yield from self._lines(data)

    def _whole(self, data: BinaryIO) -> Iterator[DataLine]:
        content = read_up_to(data, LONGEST)
        try:
            text = decode(content)
        except UnicodeDecodeError as error:
            yield DataLine(self._file.name, {}, b"", not_unicode(error, content, self._file.name))
            return
        if text.strip():
            yield piece_of({"text": text}, self._file.name)

    def _lines(self, data: BinaryIO) -> Iterator[DataLine]:
        name, number = self._file.name, 0
        while line := data.readline(LONGEST + 1):
            number += 1
            source = f"{name}:{number}"
            if number == 1:
                if (encoding := encoding_of(line[:4])) != "utf-8":
                    raise DataError(f"{name} is {encoding.upper()} text; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = data.readline(LONGEST)
                yield DataLine(source, {}, b"", f"is longer than {LONGEST // 10**6:,} MB")
            elif line.strip():
                yield (_text_line if self._file.kind == ".txt" else _json_line)(line.strip(), source)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """DataError for what the libraries raise."""
        name = self._file.name
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{name} is damaged: {error}; make it again") from error
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}; name a readable file") from error


def _opened(file: DataFile) -> BinaryIO:
    if file.path == "-":
        return sys.stdin.buffer
    try:
        return open_file(file.path, streams=True)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}; name a readable file") from error


def _decompressed(raw: BinaryIO, file: DataFile) -> BinaryIO:
    if file.compression == ".gz":
        content: Any = gzip.GzipFile(fileobj=raw)
        return content
    return io.BufferedReader(_Zstandard(raw, file.name), 2**17) if file.compression else raw


class _Zstandard(io.RawIOBase):
    """The content of Zstandard frames. The library's own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: BinaryIO, name: str):
        self._raw, self._name = raw, name
        self._library = zstandard()
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            chunk = rest or self._raw.read(_CHUNK)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def zstandard() -> Any:
    """The library. OptionError where it is not installed."""
    try:
        import zstandard as library
    except ImportError as error:
        raise OptionError('.zst files need the package zstandard: pip install "phi3-mlx[data]"') from error
    return library


def _json_line(line: bytes, source: str) -> DataLine:
    try:
        value = parse(line.decode())
    except UnicodeDecodeError:
        return DataLine(source, {}, b"", "is not UTF-8 text")
    except ValueError as error:
        return DataLine(source, {}, b"", f"is not JSON ({error}); expected one JSON object a line")
    if not isinstance(value, dict):
        return DataLine(source, {}, b"", f"is {kind_of(value)}; expected a JSON object")
    return DataLine(source, value, line)


def _text_line(line: bytes, source: str) -> DataLine:
    try:
        return piece_of({"text": line.decode()}, source)
    except UnicodeDecodeError:
        return DataLine(source, {}, b"", "is not UTF-8 text")


def piece_of(value: dict[str, Any], source: str) -> DataLine:
    """A record that was no JSON, with its line of JSON."""
    return DataLine(source, value, json_text(value).encode())


def _of_parquet(raw: BinaryIO, name: str) -> Iterator[DataLine]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OptionError('Parquet files need the package pyarrow: pip install "phi3-mlx[data]"') from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield _parquet_row(value, f"{name}:{number}")
    except (pyarrow.ArrowException, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{name} is damaged: {str(error).splitlines()[0]}; make it again") from error


def _parquet_row(value: dict[str, Any], source: str) -> DataLine:
    try:
        return piece_of({key: _as_json(part, key) for key, part in value.items()}, source)
    except ValueError as error:
        return DataLine(source, {}, b"", str(error))


def _as_json(value: Any, key: str) -> Any:
    """A cell as JSON has it: dates and decimals as texts. ValueError for what JSON has no form for."""
    if isinstance(value, dict):
        return {name: _as_json(part, key) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part, key) for part in value]
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"has {type(value).__name__} in {key!r}, which JSON cannot hold; leave that column out")
