"""Steps that look at each record by itself: over shards of the files, in several processes, resumed after a kill.

A shard is a large file, or some small ones. Beside the output stands `OUTPUT.shards`, with a folder for each portion of
a shard that is finished: its records, and `shard.json`, which says what was made of them. In the end they are put
together in their order and taken away, so the output is the same however many processes there are. A shard that was
stopped is read from its beginning, as compressed files must be, and worked on from its first unfinished portion.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice, takewhile
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from .. import __version__ as version
from ..errors import DataError
from ..fields import parse
from ..files import json_text, read_bytes
from ..store.atomic import FINDER, is_partial, new_directory
from ..store.line_file import alone_in, disk_faults
from ..values import check_function
from .formats import DATA_REPORT, DataFile
from .options import ReadOptions, WriteOptions
from .records import Advance, Broken, DataPath, DataRecord, OnAdvance, Records
from .step import check_output_folder, new_folder, report_head, step_files

_SHARD_FILE, _UNFINISHED = "shard.json", ".shards"
_SMALL_BYTES = 4 * 2**20  # small files share a shard until they have this many
_PORTION_BYTES = 64 * 2**20  # of JSON: what a kill may cost


class ShardFiles(Protocol):
    """What a step writes into a folder: a `DataStep` is one."""

    counts: Counter[str]
    facts: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """For `take`, as JSON."""

    def take(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Add what another one wrote into `folder`."""

    def outcome(self) -> dict[str, Any]:
        """What the report says of all of it."""


@dataclass(frozen=True)
class ShardStep:
    """A step whose `work` keeps or removes each of some records, whatever others there are; it can be pickled.

    `read` and `parts` are how records are read and the files of kept ones, `facts` what the report says of the
    `counts` that `work` made.
    """

    name: str
    stage: str
    read: ReadOptions
    options: Any  # a dataclass
    parts: tuple[str, ...] = ("data",)

    def files(self, folder: Path, compress: str | None = None) -> AbstractContextManager[Any]:
        """The `ShardFiles` in an empty folder: by default those of a `DataStep`."""
        return step_files(folder, self.parts, compress)

    def work(self, records: Iterable[DataRecord], step: Any) -> None:
        """Put what becomes of the records into the `files` of the step."""
        raise NotImplementedError

    def facts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {}

    def digest(self) -> str:
        """Another one where the step does another thing with the same options, as those may name a file."""
        return ""


def run_shards(
    step: ShardStep,
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    write: WriteOptions,
    *,
    processes: int,
    progress: OnAdvance | None,
    also_read: Sequence[Records] = (),
) -> dict[str, Any]:
    """Do a step in the folder `output`; its report. What an earlier, killed run finished is not done again.

    `also_read`: what the step has read besides; other files there begin anew. Raises DataError.
    """
    check_function(progress, "progress")
    records = Records(inputs, step.read, step.stage, None)
    everything = [records, *also_read]
    place = check_output_folder(output, everything, write)
    kept = place.with_name(place.name + _UNFINISHED)
    shards = [_Shard(files, kept / _key(step, files, also_read)) for files in _shared(records.files)]
    with _kept(kept), new_folder(output, everything, write) as folder:
        told = _Told(step.stage, sum(file.size for file in records.files), progress)
        for shard in shards:
            if shard.is_finished:
                told.tell(shard, sum(file.size for file in shard.files), 0)
        _work(step, [shard for shard in shards if not shard.is_finished], processes, told)
        with step.files(folder, write.compress) as whole:
            for shard in shards:
                shard.put_into(whole, records)
        if not sum(records.read.values()) + records.broken_count:
            for shard in shards:
                shard.remove()
            raise DataError(f"{', '.join(file.name for file in records.files)[:200]}: no records; give one a line")
        told.end(records)
        report = report_head(step.name, everything, asdict(step.options))
        report |= whole.outcome() | step.facts(whole.counts) | whole.facts
        (folder / DATA_REPORT).write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
    return report


@contextmanager
def _kept(place: Path) -> Iterator[None]:
    """The folder of finished shards, for this run alone; it goes in the end, or after an error if it holds none.

    DataError for a folder that holds anything else, which would go with them.
    """
    with disk_faults(place):
        ours = not place.exists() or (place.is_dir() and all(map(_is_ours, place.iterdir())))
    if not ours:
        raise DataError(f"{place} holds something else than shards, for which it is needed; name another output")
    with alone_in(place):
        try:
            yield
        except BaseException:
            if not any((folder / _SHARD_FILE).exists() for folder in place.iterdir()):
                shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    return path.name == FINDER or is_partial(path) or re.fullmatch("[0-9a-f]{32}-[0-9]{5,}", path.name) is not None


@dataclass(frozen=True)
class _Shard:
    """Some files, and where what becomes of their records is kept."""

    files: tuple[DataFile, ...]
    place: Path

    @property
    def is_finished(self) -> bool:
        portions = self._portions()
        return bool(portions) and bool(_state_in(portions[-1])["is_last"])

    @property
    def needs_this_process(self) -> bool:
        """Whether it is a pipe, which no other process has."""
        return not all(file.is_regular for file in self.files)

    def do(self, step: ShardStep, progress: OnAdvance) -> None:
        """Do the step with these files, but for portions that are there; each appears when it is complete."""
        records = Records([file.path for file in self.files], step.read, step.stage, progress, may_be_empty=True)
        rest, portions = iter(records), self._portions()
        if portions:
            deque(islice(rest, sum(_state_in(portions[-1])["read"].values())), maxlen=0)
        for number in count(len(portions)):
            portion = _Portion(records.files, rest)
            with new_directory(self._portion(number), mark=_SHARD_FILE, fault=DataError) as folder:
                with step.files(folder) as made:
                    step.work(portion, made)
                state = {"read": records.read, "broken": records.broken, "broken_count": records.broken_count}
                state |= {"is_last": portion.is_last, "step": made.state()}
                (folder / _SHARD_FILE).write_text(json_text(state) + "\n", encoding="utf-8")
            if portion.is_last:
                return

    def put_into(self, whole: ShardFiles, records: Records) -> None:
        """Add what was made of these files to the step's files, and what was read to `records`."""
        for portion in self._portions():
            state = _state_in(portion)
            with disk_faults(portion):
                whole.take(portion, state["step"])
        records.take(state["read"], [Broken(*broken) for broken in state["broken"]], state["broken_count"])

    def remove(self) -> None:
        """Take away what was finished: there is nothing in it."""
        for portion in self._portions():
            shutil.rmtree(portion, ignore_errors=True)

    def _portion(self, number: int) -> Path:
        return self.place.with_name(f"{self.place.name}-{number:05d}")

    def _portions(self) -> list[Path]:
        """Those that are complete, in their order."""
        return [*takewhile(lambda place: (place / _SHARD_FILE).is_file(), map(self._portion, count()))]


class _Portion:
    """The next of some records, until they have `_PORTION_BYTES`; `is_last` once they are all and there are no more."""

    def __init__(self, files: Sequence[DataFile], records: Iterator[DataRecord]):
        self.files, self.is_last = files, False
        self._records = records

    def __iter__(self) -> Iterator[DataRecord]:
        size = 0
        while size < _PORTION_BYTES:
            record = next(self._records, None)
            if record is None:
                self.is_last = True
                return
            size += len(record.line)
            yield record


def _state_in(portion: Path) -> dict[str, Any]:
    """What was made of a portion, and what had been read of the shard by its end."""
    with disk_faults(portion):
        state: dict[str, Any] = parse(read_bytes(portion / _SHARD_FILE, most=None).decode())
    return state


def _shared(files: Sequence[DataFile]) -> list[tuple[DataFile, ...]]:
    """The files in their order, small ones together."""
    shards: list[list[DataFile]] = []
    size = 0
    for file in files:
        if not shards or size + file.size > _SMALL_BYTES or not file.is_regular:
            shards.append([])
            size = 0
        shards[-1].append(file)
        size += file.size if file.is_regular else _SMALL_BYTES
    return [tuple(shard) for shard in shards]


def _key(step: ShardStep, files: Sequence[DataFile], also_read: Sequence[Records]) -> str:
    """A name for what is made of files as they are now; of a pipe, which cannot be known again, always another."""
    given = [
        version,
        step.name,
        step.parts,
        asdict(step.read),
        asdict(step.options),
        step.digest(),
        [_state_of(file) for file in files],
        [[_state_of(file) for file in records.files] for records in also_read],
    ]
    return hashlib.sha256(json_text(given).encode()).hexdigest()[:32]


def _state_of(file: DataFile) -> list[Any]:
    if not file.is_regular:
        return [os.urandom(16).hex()]
    known = os.stat(file.path)
    return [file.path, os.path.realpath(file.path), known.st_size, known.st_mtime_ns]


class _Told:
    """How far all shards are together."""

    def __init__(self, stage: str, total: int, progress: OnAdvance | None):
        self._stage, self._total, self._progress = stage, total, progress
        self._done: dict[Path, tuple[int, int]] = {}  # bytes and records

    def tell(self, shard: _Shard, done: int, records: int) -> None:
        self._done[shard.place] = done, records
        if self._progress is not None:
            bytes_done, records_done = (sum(column) for column in zip(*self._done.values(), strict=True))
            self._progress(Advance(self._stage, min(bytes_done, self._total), self._total, records_done))

    def end(self, records: Records) -> None:
        if self._progress is not None:
            self._progress(Advance(self._stage, self._total, self._total, sum(records.read.values())))


def _work(step: ShardStep, shards: Sequence[_Shard], processes: int, told: _Told) -> None:
    """Do the shards: those of pipes here, the others in `processes` if they are several."""
    elsewhere = [shard for shard in shards if not shard.needs_this_process]
    if processes == 1 or len(elsewhere) < 2:
        elsewhere = []
    for shard in shards:
        if shard not in elsewhere:
            shard.do(step, _teller(told, shard))
    if elsewhere:
        with _Workers(step, min(processes, len(elsewhere))) as workers:
            workers.do(elsewhere, told)


def _teller(told: _Told, shard: _Shard) -> Callable[[Advance], None]:
    return lambda now: told.tell(shard, now.done, now.records)


class _Workers:
    """Processes that do shards. Spawned, because MLX and threads do not survive a fork."""

    def __init__(self, step: ShardStep, count: int):
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[tuple[Any, Any]] = []  # each with its end of the pipe
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, step), daemon=True)
            self._pipes.append(ours)
            self._processes.append((process, theirs))

    def __enter__(self) -> _Workers:
        for process, theirs in self._processes:
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self._processes:
            process.terminate()
        for (process, _), pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def do(self, shards: Sequence[_Shard], told: _Told) -> None:
        """Do all shards. Raises what one of them raised first, and DataError for a process that was killed."""
        waiting = deque(shards)
        busy: dict[Any, _Shard] = {}  # by pipe
        for pipe in self._pipes:
            busy[pipe] = _sent(waiting.popleft(), pipe)
        while busy:
            pipes: list[Any] = wait(busy)
            for pipe in pipes:
                try:
                    said = pipe.recv()
                except EOFError:
                    raise _killed(busy[pipe]) from None
                if isinstance(said, BaseException):
                    raise said
                if said is not None:
                    told.tell(busy[pipe], *said)
                elif waiting:
                    busy[pipe] = _sent(waiting.popleft(), pipe)
                else:
                    del busy[pipe]


def _sent(shard: _Shard, pipe: Any) -> _Shard:
    try:
        pipe.send(shard)
    except OSError:
        raise _killed(shard) from None
    return shard


def _killed(shard: _Shard) -> DataError:
    return DataError(
        f"{shard.files[0].name}: the process that worked on it ended; give fewer processes where memory is short, and "
        "in a script call this under `if __name__ == '__main__':`, which several processes need"
    )


def _serve(pipe: Any, step: ShardStep) -> None:
    """A process: does shards until there are no more. It answers with how far it is, then None, or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    while True:
        try:
            shard = pipe.recv()
        except EOFError:
            return
        try:
            shard.do(step, lambda now: pipe.send((now.done, now.records)))
            pipe.send(None)
        except BrokenPipeError:
            return
        except Exception as error:
            pipe.send(error)
