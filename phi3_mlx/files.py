"""Reading users' files: regular files of bounded size, and text in whatever Unicode encoding an editor wrote.

Python opens anything that a name leads to: a FIFO waits forever, /dev/zero has no end. What is read goes through here.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import select
import shlex
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO

from .fields import parse

_PATIENCE = 2.0  # seconds for whoever writes into a FIFO to open it
LARGEST = 10**8  # bytes of a text: three times the largest tokenizer.json, far more than any context holds
_MARKS = {  # UTF-16's mark is how UTF-32's begins
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def open_file(path: str | os.PathLike[str], *, streams: bool = False) -> BinaryIO:
    """A regular file, opened to read its bytes. OSError, whose `strerror` says why, for anything else.

    `streams` allows pipes and terminals as well (`-f <(command)`). A FIFO that nobody opens to write is empty.
    """
    try:
        kind = os.stat(path).st_mode
    except ValueError as error:  # a null character, or half a character that stands for no byte
        raise OSError(errno.EINVAL, "no file can have that name", path) from error
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if stat.S_ISREG(kind):
        return open(path, "rb")
    if not streams:
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a FIFO would wait for its writer
    select.select([descriptor], [], [], _PATIENCE)
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], *, most: int | None = LARGEST, streams: bool = False) -> bytes:
    """All bytes of a file that `open_file` opens. OSError for one that has more than `most`."""
    with open_file(path, streams=streams) as file:
        return file.read() if most is None else read_up_to(file, most)


def read_up_to(file: BinaryIO, most: int = LARGEST) -> bytes:
    """All bytes that an open file still has. OSError if these are more than `most`."""
    data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"longer than {most // 10**6:,} MB", getattr(file, "name", None))
    return data


def as_utf8(data: bytes) -> bytes:
    """Text in UTF-8 without a byte order mark. What has no mark of UTF-16 or UTF-32, nor their zeros, is let be.

    UnicodeDecodeError for broken UTF-16 or UTF-32.
    """
    encoding = encoding_of(data)
    data = data[len(_mark(data)) :]
    return data if encoding == "utf-8" else data.decode(encoding).encode()


def encoding_of(data: bytes) -> str:
    """Which of Unicode's encodings a text is in, by how its bytes begin: "utf-8" where they say nothing else."""
    # Without a mark: a text's first character is hardly ever beyond Latin-1, so its other bytes are zeros.
    return _MARKS.get(_mark(data)) or json.detect_encoding(data)


def _mark(data: bytes) -> bytes:
    """The byte order mark that a text begins with."""
    return next((mark for mark in _MARKS if data.startswith(mark)), b"")


def decode(data: bytes) -> str:
    """The text of UTF-8, or of UTF-16 or UTF-32 (as Windows writes it). UnicodeDecodeError for anything else."""
    return as_utf8(data).decode("utf-8")


def read_text(path: str | os.PathLike[str], *, most: int | None = LARGEST, streams: bool = False) -> str:
    """The text of a file. OSError, UnicodeDecodeError."""
    return decode(read_bytes(path, most=most, streams=streams))


def read_any_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. OSError, ValueError (`fields.parse`)."""
    return parse(read_text(path))


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes and UTF-8 holds: NaN and infinity, which JSON lacks, become null.

    Halves of a character, which stand for bytes that were not UTF-8, are escaped.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def not_unicode(error: UnicodeDecodeError, data: bytes, name: str | os.PathLike[str]) -> str:
    """Why the bytes of the file `name` ("stdin" of a pipe) are no text, and what makes them one."""
    where = f"byte {error.start + 1:,}"
    if error.encoding != "utf-8":
        return f"begins as {error.encoding.upper()} text and is none ({where}); save it as UTF-8"
    try:
        data.decode("cp1252")  # what most old text of Western languages is in
    except UnicodeDecodeError:
        return f"is not UTF-8 text ({where}); save it as UTF-8"
    command = "iconv -f WINDOWS-1252 -t UTF-8"
    if name == "stdin":
        return f"is not UTF-8 text ({where}); pipe it through {command}"
    return f"is not UTF-8 text ({where}); convert it: {command} {shlex.quote(os.fspath(name))} > utf-8.txt"
