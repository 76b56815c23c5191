"""What every step writes: a folder with the records it kept, those it removed and why, and report.json.

The folder appears when all of it is written; a step that fails or is stopped leaves nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__ as version
from ..errors import DataError, OptionError
from ..files import json_text
from ..store.atomic import check_destination, new_directory
from ..values import path
from .formats import DATA_REPORT, REMOVED, zstandard
from .options import WriteOptions
from .records import DataRecord, Records

_SAMPLES_KEPT, _SAMPLE_CHARACTERS = 5, 240


class Samples:
    """A few of many records, each as likely: those whose sources have the least hashes, whoever counts which part."""

    def __init__(self) -> None:
        self.count = 0
        self._drawn: list[tuple[str, dict[str, Any]]] = []  # hash and sample, in the order of the records

    @property
    def shown(self) -> list[dict[str, Any]]:
        return [sample for _, sample in self._drawn]

    def add(self, record: DataRecord, **more: Any) -> None:
        self.count += 1
        rank = hashlib.blake2b(record.source.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        if len(self._drawn) < _SAMPLES_KEPT or rank < max(other for other, _ in self._drawn):
            text = record.text[:_SAMPLE_CHARACTERS]
            sample = {"source": record.source, "text": text + ("…" if len(text) < len(record.text) else ""), **more}
            self._draw([(rank, sample)])

    def state(self) -> dict[str, Any]:
        """For `take`, as JSON."""
        return {"count": self.count, "drawn": self._drawn}

    def take(self, state: Mapping[str, Any]) -> None:
        """Count the records of another part, which comes behind this one."""
        self.count += state["count"]
        self._draw([(rank, sample) for rank, sample in state["drawn"]])

    def _draw(self, more: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._drawn += more
        while len(self._drawn) > _SAMPLES_KEPT:
            ranks = [rank for rank, _ in self._drawn]
            last = max(range(len(ranks)), key=lambda place: (ranks[place], place))
            del self._drawn[last]


class _Output:
    """A file of kept records."""

    def __init__(self, name: str, file: BinaryIO):
        self.name, self.file, self.samples, self.characters = name, file, Samples(), 0


class DataStep:
    """A step at work: `keep` and `remove` say what becomes of each record, `facts` are what its report says besides.

    `counts` are what a step over shards counts besides.
    """

    def __init__(self, outputs: Mapping[str, _Output], removed: BinaryIO):
        self.facts: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.report: dict[str, Any] = {}  # what report.json holds, once the step is done
        self._outputs, self._removed = outputs, removed
        self._reasons: dict[str, Samples] = {}

    def keep(self, record: DataRecord, part: str = "data", line: bytes | None = None) -> None:
        """Write a record, as it was read or with another `line`."""
        output = self._outputs[part]
        output.file.write((record.line if line is None else line) + b"\n")
        output.samples.add(record)
        output.characters += len(record.text)

    def remove(self, record: DataRecord, reason: str, **more: Any) -> None:
        """Leave a record out; `more` says, beside the reason, what it was compared with."""
        self._reasons.setdefault(reason, Samples()).add(record, **more)
        line = {"source": record.source, "reason": reason, **more}
        self._removed.write(json_text(line).encode() + b"\n")

    def state(self) -> dict[str, Any]:
        """For `take`, as JSON."""
        return {
            "outputs": {
                part: {"name": output.name, "characters": output.characters, "samples": output.samples.state()}
                for part, output in self._outputs.items()
            },
            "reasons": {reason: samples.state() for reason, samples in self._reasons.items()},
            "counts": self.counts,
        }

    def take(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Add what another step wrote into `folder`, uncompressed, and counted."""
        for part, made in state["outputs"].items():
            output = self._outputs[part]
            output.samples.take(made["samples"])
            output.characters += made["characters"]
            with (folder / made["name"]).open("rb") as file:
                shutil.copyfileobj(file, output.file)
        with (folder / REMOVED).open("rb") as file:
            shutil.copyfileobj(file, self._removed)
        for reason, samples in state["reasons"].items():
            self._reasons.setdefault(reason, Samples()).take(samples)
        self.counts.update(state["counts"])

    def outcome(self) -> dict[str, Any]:
        """What was kept and what removed, with samples."""
        reasons = sorted(self._reasons.items(), key=lambda item: -item[1].count)
        return {
            "kept": sum(output.samples.count for output in self._outputs.values()),
            "removed": sum(samples.count for _, samples in reasons),
            "outputs": {
                output.name: {
                    "records": output.samples.count,
                    "characters": output.characters,
                    "samples": output.samples.shown,
                }
                for output in self._outputs.values()
            },
            "reasons": {reason: {"records": samples.count, "samples": samples.shown} for reason, samples in reasons},
        }


@contextmanager
def new_step(
    name: str,
    output: str | os.PathLike[str],
    records: Sequence[Records],
    write: WriteOptions,
    options: Mapping[str, Any],
    parts: Sequence[str] = ("data",),
) -> Iterator[DataStep]:
    """The folder `output` of a step, which appears with its report.json when the block ends without an error.

    `records` are all that it reads, `options` what its report says was asked for, `parts` the files of kept records.
    Raises DataError if something else is there, if nothing can be written there, or if it holds what is read.
    """
    with new_folder(output, records, write) as folder:
        with step_files(folder, parts, write.compress) as step:
            yield step
        step.report = report_head(name, records, options) | step.outcome() | step.facts
        (folder / DATA_REPORT).write_text(json_text(step.report, indent=1) + "\n", encoding="utf-8")


@contextmanager
def step_files(folder: Path, parts: Sequence[str] = ("data",), compress: str | None = None) -> Iterator[DataStep]:
    """The files of kept and removed records in an empty folder, without a report."""
    ending = ".jsonl" + (f".{compress}" if compress else "")
    with ExitStack() as stack:
        outputs = {
            part: _Output(f"{part}{ending}", stack.enter_context(_new(folder / f"{part}{ending}", compress)))
            for part in parts
        }
        yield DataStep(outputs, stack.enter_context((folder / REMOVED).open("wb")))


@contextmanager
def new_folder(output: str | os.PathLike[str], records: Sequence[Records], write: WriteOptions) -> Iterator[Path]:
    """An empty folder that becomes `output`, never one that holds what is read. Raises DataError."""
    place = output_place(output, records)
    with new_directory(place, force=write.force, mark=DATA_REPORT, fault=DataError) as folder:
        yield folder


def output_place(output: str | os.PathLike[str], records: Sequence[Records]) -> Path:
    """Where a folder is written. DataError if it holds what is read, OptionError for what is no path."""
    if output == "":
        raise OptionError("output is ''; name a directory")
    place = Path(os.path.realpath(os.path.expanduser(path(output, "output"))))
    for file in (file for some in records for file in some.files):
        read = Path(os.path.realpath(file.path))
        if file.path != "-" and (read == place or place in read.parents):
            raise DataError(f"{output} holds {file.path}, which is read; name another directory")
    return place


def check_output_folder(output: str | os.PathLike[str], records: Sequence[Records], write: WriteOptions) -> Path:
    """Where `new_folder` writes; raises what that would, before long work."""
    place = output_place(output, records)
    check_destination(place, force=write.force, mark=DATA_REPORT, fault=DataError)
    return place


def report_head(name: str, records: Sequence[Records], options: Mapping[str, Any]) -> dict[str, Any]:
    """How every report begins: the step, what was asked for, and what was read."""
    return {
        "step": name,
        "version": version,
        "options": dict(options),
        "inputs": [
            {"file": file.name, "bytes": file.size or None, "records": some.read.get(file.name, 0)}
            for some in records
            for file in some.files
        ],
        "read": sum(sum(some.read.values()) for some in records),
        "broken": {
            "records": sum(some.broken_count for some in records),
            "samples": [broken._asdict() for some in records for broken in some.broken],
        },
    }


@contextmanager
def _new(path: Path, compress: str | None) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        if compress == "gz":  # without name and time, so that equal records are equal files
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream:
                yield stream  # type: ignore[misc]
        elif compress == "zst":
            with zstandard().ZstdCompressor().stream_writer(file, closefd=False) as stream:
                yield stream
        else:
            yield file
