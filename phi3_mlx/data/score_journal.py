"""What a model said of each record, a line each as it comes: a run that was killed goes on from there.

Lines are read one after the other beside the records, so that memory does not grow.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from ..files import json_text
from ..store.line_file import alone_in, check_head, damaged, disk_faults, head_of, object_of

_SCORES_NAME, _SCORES_FORMAT = "scores.jsonl", 1
_REMEDY = "remove it to begin anew"


class ScoreJournal:
    """The scores in an open file, each with `keys`. Raises DataError for a file of another run than `identity` says."""

    def __init__(self, path: Path, file: BinaryIO, identity: Mapping[str, Any], keys: Collection[str]):
        self._path, self._file, self._score_keys = path, file, {*keys}
        self.lines = 0  # read or written, with the first, which is the identity
        self._reads = True
        head = head_of("scores", _SCORES_FORMAT, identity)
        stored = self._next()
        if stored is None:
            self._write(head)
        else:
            check_head(path, stored, head, _REMEDY)

    def known(self, digest: str) -> dict[str, Any] | None:
        """What was said of the next record, whose text has this digest; None behind the last line."""
        line = self._next()
        if line is None:
            return None
        if line.get("text") != digest:
            raise DataError(
                f"{self._path.parent} was begun with other records (line {self.lines:,}); give the same again, or "
                f"{_REMEDY}"
            )
        score = line.get("score")
        if not isinstance(score, dict) or score.keys() != self._score_keys or not all(map(_is_number, score.values())):
            raise damaged(self._path, f"line {self.lines:,} holds no score")
        return score

    def add(self, digest: str, score: Mapping[str, Any]) -> None:
        """Write down what was said of the next record, once `known` has told all there was."""
        self._write({"text": digest, "score": score})

    def _next(self) -> dict[str, Any] | None:
        """The next line. What is behind the last whole one was being written when a run was killed, and goes."""
        if not self._reads:
            return None
        place = self._file.tell()
        line = self._file.readline()
        if not line.endswith(b"\n"):
            self._reads = False
            self._file.seek(place)
            self._file.truncate()
            return None
        self.lines += 1
        return object_of(line, self._path, self.lines)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json_text(line).encode() + b"\n")
        self._file.flush()
        self.lines += 1


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and math.isfinite(value))


@contextmanager
def score_journal(output: Path, identity: Mapping[str, Any], keys: Collection[str]) -> Iterator[ScoreJournal]:
    """The journal of a run that writes `output`, in a folder beside it, which stays if the block fails with scores.

    Raises DataError where another run has it, or the disk takes no more.
    """
    path = unfinished_folder(output) / _SCORES_NAME
    with alone_in(path.parent):
        with disk_faults(path), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            journal = ScoreJournal(path, file, identity, keys)
            try:
                yield journal
            except BaseException:
                if journal.lines > 1:
                    raise
                _remove(path)
                raise
        _remove(path)


def unfinished_folder(output: Path) -> Path:
    """Where the scores of a run that writes `output` are until it is done."""
    return output.with_name(f"{output.name}.unfinished")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody put a file of theirs there
        path.unlink()
        path.parent.rmdir()
