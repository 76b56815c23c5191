"""Shares of records: dealt out to several files, or drawn from several."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from ..errors import OptionError
from ..option import arguments
from ..values import check_function, number, path, plain, refusal
from .options import MixOptions, ReadOptions, SplitOptions, WorkOptions, WriteOptions
from .records import ADVANCE_EVERY, Advance, DataPath, DataRecord, OnAdvance, Records
from .shards import ShardStep, run_shards
from .step import DataStep, new_step

_PART_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_HELD = 64 * 2**20  # bytes of records to draw from
_NO_PARTS = {"removed"}  # of another file there


def split_data(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    *,
    part: Mapping[str, float] | Sequence[str] = SplitOptions.part,
    seed: int = SplitOptions.seed,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    processes: int = WorkOptions.processes,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Deal records out to files `NAME.jsonl` in the folder `output`, each with about its share of them; the report.

    `part`: shares by name, also as texts "NAME=SHARE". What they leave of 1 is left out. A record's file depends on its
    text and `seed` alone: equal texts are never on both sides, and new records do not move old ones. Raises DataError,
    OptionError.
    """
    given: Any = [f"{name}={plain(share)!r}" for name, share in part.items()] if isinstance(part, Mapping) else part
    options = SplitOptions(given, seed)
    names = tuple(_shares(options.part))
    step = _Split("split", "splitting", ReadOptions(field, lines, skip_broken), options, names)
    count = WorkOptions(processes).processes
    return run_shards(step, inputs, output, WriteOptions(compress, force), processes=count, progress=progress)


class _Split(ShardStep):
    """The step over shards."""

    def work(self, records: Iterable[DataRecord], step: DataStep) -> None:
        shares = _shares(self.options.part)
        names, ends = [*shares], [*accumulate(shares.values())]
        for record in records:
            place = _place_of(record.text, self.options.seed)
            name = next((name for name, end in zip(names, ends, strict=True) if place < end), None)
            if name is not None:
                step.keep(record, name)
            elif ends[-1] > 1 - 1e-9:  # a sum of shares that was rounded
                step.keep(record, names[-1])
            else:
                step.remove(record, "outside the shares")


def _place_of(text: str, seed: int) -> float:
    """Where a text lies from 0 to 1: as good as random, and always the same."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def _shares(parts: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in parts:
        name, _, share = part.rpartition("=")
        if not _PART_NAME.fullmatch(name) or name.lower() in _NO_PARTS:
            raise OptionError(f"part {part!r} has no name for a file; write NAME=SHARE, as train=0.9")
        if same := next((other for other in shares if other.lower() == name.lower() and other != name), None):
            raise OptionError(f"part {name!r} is {same!r} but for capitals, which is one file on many disks; rename it")
        if name in shares:
            raise OptionError(f"part {name!r} is given twice; give it once, with the sum of the shares")
        shares[name] = _share(share, f"part {name}")
    if not shares or sum(shares.values()) > 1 + 1e-9:
        raise OptionError(f"part: the shares are {sum(shares.values()):g} together; expected more than 0, at most 1")
    return shares


def _share(given: Any, name: str) -> float:
    try:
        share = float(given) if isinstance(given, str) else number(given, name)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise OptionError(f"{name} has the share {given!r}; give a number greater than 0")
    return share


def mix_data(
    inputs: Mapping[DataPath, float],
    output: DataPath,
    *,
    by: str = MixOptions.by,
    records: int | None = MixOptions.records,
    epochs: int = MixOptions.epochs,
    shuffle: int = MixOptions.shuffle,
    seed: int = MixOptions.seed,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Put records of several files together, in the proportions of their shares all along; the report.

    `inputs`: shares of files or folders; only their proportions count. The next record comes from the file that lacks
    most of its share, so any beginning of the mix has the proportions too. The mix ends at `records`, or where a file
    that has no records left, after `epochs` readings, should give one. Raises DataError, OptionError.
    """
    options = MixOptions(**arguments(MixOptions, locals()))
    write = WriteOptions(compress, force)
    check_function(progress, "progress")
    if not isinstance(inputs, Mapping):
        raise refusal(inputs, "inputs", "a mapping of files to their shares")
    if not inputs:
        raise OptionError("mix needs files and their shares; write FILE=SHARE")
    given = {path(file, "inputs"): _share(share, f"{file}") for file, share in inputs.items()}
    read = ReadOptions(field, lines, skip_broken)
    sources = [_Source(path, read, share, options) for path, share in given.items()]
    advance = _MixAdvance(sources, options.records, progress)
    everything = [source.records for source in sources]
    with new_step("mix", output, everything, write, asdict(options)) as step:
        written = 0
        while written != options.records:
            source = min(sources, key=lambda source: source.taken / source.share)
            record = source.next()
            if record is None:
                break
            step.keep(record)
            written += 1
            advance.tell(written)
        advance.tell(written, ended=True)
        total = sum(source.taken for source in sources)
        step.facts["mix"] = [
            {
                "inputs": [file.name for file in source.records.files],
                "asked": source.share / sum(given.values()),
                "got": source.taken / total if total else 0.0,
                "records": source.count,
                "readings": source.readings,
                "ended_the_mix": source.ended,
            }
            for source in sources
        ]
    return step.report


class _MixAdvance:
    """How far a mix is: the largest share that was taken of a source, since the first that ends is the end of the mix,
    or the share of its number of records, if that is more. Told in bytes of all files, and never less than before.
    """

    def __init__(self, sources: Sequence[_Source], records: int | None, progress: OnAdvance | None):
        self._sources, self._records, self._progress = sources, records, progress
        self._total = sum(file.size for source in sources for file in source.records.files)
        self._furthest, self._told = 0.0, time.monotonic()

    def tell(self, written: int, *, ended: bool = False) -> None:
        if self._progress is None or (not ended and time.monotonic() - self._told < ADVANCE_EVERY):
            return
        self._told = time.monotonic()
        shares = [source.share_taken for source in self._sources]
        by_number = written / self._records if self._records else 0.0
        self._furthest = 1.0 if ended else max(self._furthest, by_number, *shares)
        self._progress(Advance("mixing", int(self._furthest * self._total), self._total, written))


class _Source:
    """One of the files of a mix."""

    def __init__(self, path: DataPath, read: ReadOptions, share: float, options: MixOptions):
        records = Records(path, read, "mixing", self._advanced)
        if options.epochs > 1 and (pipe := next((file for file in records.files if not file.is_regular), None)):
            raise OptionError(f"epochs {options.epochs}: {pipe.name} can be read only once; write it to a file first")
        self.records, self.share = records, share
        self.taken = self.count = self.readings = 0  # `taken` is in what the shares are of
        self.ended = False
        self._epochs, self._before = options.epochs, 0  # `_before`: records of earlier readings
        self._read: Advance | None = None  # of this reading
        self._characters = options.by == "characters"
        names = repr([file.name for file in records.files])
        self._stream = self._records(options, random.Random(f"{options.seed} {names}"))

    def next(self) -> DataRecord | None:
        record = next(self._stream, None)
        if record is None:
            self.ended = True
            return None
        self.count += 1
        self.taken += len(record.text) if self._characters else 1
        return record

    @property
    def share_taken(self) -> float:
        """How much of all that the source has is taken; what waits to be drawn is read, but not taken."""
        now = self._read
        if now is None or not now.total or not now.records:
            return max(self.readings - 1, 0) / self._epochs
        here = now.done / now.total * min(1.0, (self.count - self._before) / now.records)
        return (self.readings - 1 + here) / self._epochs

    def _advanced(self, now: Advance) -> None:
        self._read = now

    def _records(self, options: MixOptions, source: random.Random) -> Iterator[DataRecord]:
        for _ in range(options.epochs):
            self.readings, self._before, self._read = self.readings + 1, self.count, None
            yield from shuffled(self.records, options.shuffle, source)


def shuffled(records: Iterable[DataRecord], count: int, source: random.Random) -> Iterator[DataRecord]:
    """Records in another order: each is drawn from `count` that were read, or from as many as fit into 64 MB."""
    held: list[DataRecord] = []
    size = 0
    for record in records:
        held.append(record)
        size += len(record.line)
        while len(held) >= count or size > _HELD:
            drawn = _draw(held, source)
            size -= len(drawn.line)
            yield drawn
    while held:
        yield _draw(held, source)


def _draw(held: list[DataRecord], source: random.Random) -> DataRecord:
    place = source.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()
