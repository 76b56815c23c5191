"""The answers of an evaluation, a line each as they come: what a run that was killed leaves, and the next goes on from.

The first line says which evaluation it is. Then comes a line for all questions of a kind, with a digest of what the
model reads, so that other questions, examples, templates or tokenizers are noticed; and a line for each answer, with
its place among them. A line that was being written when the run was killed is taken away.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..store.line_file import LineFile, alone_in, damaged, head_of

ANSWERS, AGAINST = "answers.jsonl", "against"
_ANSWERS_FORMAT = 1
_RESULT_TYPES = {"loglikelihood": (float, bool), "loglikelihood_rolling": (float, bool), "generate_until": (str, str)}


def check_output(directory: Path) -> None:
    """DataError for a directory that holds something else than an evaluation, or for what is no directory."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; name another")
    begun = any((directory / name).is_file() for name in (ANSWERS, f"{AGAINST}/{ANSWERS}"))
    if not begun and any(directory.iterdir()):
        raise DataError(f"{directory} exists already and holds no evaluation; name another directory")


class Journal:
    """The answers in a file of lines, for the language model that is asked. `earlier` counts those that it had.

    Raises DataError for a file of another evaluation than `identity` says, and for a damaged one.
    """

    def __init__(self, file: LineFile, identity: Mapping[str, Any]):
        self._file = file
        self._kinds: dict[str, str] = {}
        self._known: dict[str, dict[int, Any]] = {}
        file.begin(head_of("answers", _ANSWERS_FORMAT, identity), "name another directory with output=DIR")
        for number, line in enumerate(file.lines[1:], 2):
            self._take(line, number)
        self.earlier = sum(map(len, self._known.values()))

    def begin(self, kind: str, asked: Sequence[Any]) -> dict[int, Any]:
        """By their places, the answers that there are to all questions of a kind.

        Raises DataError if other questions were asked when the file was begun.
        """
        digest = hashlib.sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()
        if kind not in self._kinds:
            self._kinds[kind] = digest
            self._file.add({"kind": kind, "questions": len(asked), "digest": digest})
        if self._kinds[kind] != digest:
            raise DataError(
                f"{self._file.path.parent} was begun with other questions, examples or prompts (their files, lm-eval "
                "or the tokenizer have changed); name another directory"
            )
        known = dict(self._known.get(kind, {}))
        if any(place >= len(asked) for place in known):
            raise damaged(self._file.path, "it answers questions that are not asked")
        return known

    def add(self, kind: str, place: int, result: Sequence[Any]) -> None:
        """Write an answer down. Raises DataError where the disk takes no more.

        One that is no number, of a broken model, is asked again: JSON has none such.
        """
        if any(isinstance(part, float) and not math.isfinite(part) for part in result):
            return
        self._file.add({"kind": kind, "place": place, "result": [*result]})

    def _take(self, line: Mapping[str, Any], number: int) -> None:
        """Know what a line of an earlier run says."""
        kind, place, result = line.get("kind"), line.get("place"), line.get("result")
        if not isinstance(kind, str) or kind not in _RESULT_TYPES:
            raise damaged(self._file.path, f"line {number:,} is of an unknown kind")
        if "digest" in line:
            self._kinds[kind] = str(line["digest"])
        elif kind not in self._kinds or not isinstance(place, int) or place < 0 or not _is_result(result, kind):
            raise damaged(self._file.path, f"line {number:,} is no answer")
        else:
            self._known.setdefault(kind, {})[place] = result


@contextmanager
def opened(directory: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in `directory`, which is made if need be and held for this run alone.

    `identity` says which evaluation it is: a value of JSON for each thing that must be the same where it goes on.
    Raises DataError: another evaluation is there, another run writes there, something else is there, or nothing can be
    written.
    """
    check_output(directory)
    with alone_in(directory):
        yield Journal(LineFile(directory / ANSWERS), identity)


def _is_result(value: Any, kind: str) -> bool:
    return isinstance(value, list) and tuple(map(type, value)) == _RESULT_TYPES[kind]
