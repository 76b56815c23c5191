"""Prefixes in the files of a directory, which several processes may share: one file, in the format of `cache build`,
holds all that was read from the first token on. They are written in a thread of their own, so that no step waits.

Only files that have a name of ours are ever removed: damaged ones, those that another goes on from, and, where the
directory holds too much, what was not used longest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CacheError
from ..models.cache import KVCache
from ..models.decoder import Model
from ..store.atomic import hold
from .background import Background
from .cache_file import Facts, Slots, read_facts, read_ids, read_layers, write_cache
from .prefill import common_length

_SUFFIX = ".cache"
_OURS = re.compile(rf"prefix-[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
_READ_AT_LEAST = 64  # tokens that a file must spare: it is read and checked as a whole
_NEW_PART = 4  # a file is written once a part of this many of its tokens is in none: an answer after another is not
_HEADER_BYTES, _TENSOR_BYTES = 1 << 16, 200  # at most, of what a file holds beside arrays
_WAIT, _PAUSE = 10.0, 0.05  # seconds: while another process writes there, and between two looks


@dataclass
class _Known:
    """A file that was looked at: what it says of itself, its ids, and whether its contents were others."""

    facts: Facts
    ids: list[int]
    damaged: bool = False


class PrefixFiles:
    """The files of `directory`, which is made, with at most `limit` bytes in those that this class writes.

    `error` is the last one that kept a file from being written. Any thread may call `find`, `write` and `settle`.
    Raises CacheError if there can be no such directory.
    """

    def __init__(self, directory: Path, limit: int):
        self._directory, self._limit = directory, limit
        self._known: dict[tuple[str, int, int], _Known | None] = {}  # by name, inode and size; None: of no use
        self._looking = threading.Lock()
        self._background = Background()
        self.error: Exception | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with os.scandir(directory):
                pass
        except FileExistsError:
            raise CacheError(f"{directory} is no folder; name one, which is made if it is not there") from None
        except OSError as error:
            raise CacheError(f"{directory} cannot be used ({error.strerror or error}); name a folder") from error

    def find(self, model: Model, facts: Facts, prompt: list[int], length: int, known: int) -> list[KVCache] | None:
        """A cache with the longest beginning of a prompt that a file has, if it is much longer than `known` tokens.

        `facts`: what a file of use says of its model, packing and LongRoPE regime. `length`: tokens that the sequence
        will have. The file counts as used, also where `known` is enough.
        """
        window, most = model.config.sliding_window, len(prompt) - 1
        by_length = [(min(common_length(file.ids, prompt), most), path, file) for path, file in self._of(facts)]
        for shared, path, file in sorted(by_length, key=lambda item: item[0], reverse=True):
            if shared < _READ_AT_LEAST:
                return None
            if shared < known + _READ_AT_LEAST:
                _use(path)
                return None
            if file.facts.start > (0 if window is None else max(0, shared - (window - 1))):
                continue  # its window has gone on
            try:
                cache = read_layers(path, file.facts, model, tokens=shared, expected=length)
            except (CacheError, RuntimeError, OSError):  # MLX raises the second where a file is cut while it is read
                file.damaged = True
                self._discard(path)
                continue
            if cache[0].sequence.ids[0].tolist() == prompt[:shared]:
                _use(path)
                return cache
        return None

    def write(
        self, facts: Facts, ids: list[int], layers: Sequence[Sequence[Slots]], done: Callable[[], None] = lambda: None
    ) -> None:
        """Let the file of `facts` be written, apart from the step, if much of it is in no file yet.

        `ids` and `layers` are `write_cache`'s. `done` is called afterwards, written or not: a fault is noted in
        `error`, and never raised.
        """

        def work() -> None:
            try:
                self._write(facts, ids, layers)
            except Exception as error:
                self.error = error
            done()

        self._background.add(work)

    def settle(self) -> None:
        """Wait until all is written that is to be."""
        self._background.settle()

    def _write(self, facts: Facts, ids: list[int], layers: Sequence[Sequence[Slots]]) -> None:
        nbytes = sum(run.nbytes for runs in layers for run in runs) + 4 * len(ids)
        arrays = sum(len(runs[0].arrays) for runs in layers)
        key = repr((facts.model, facts.bits, facts.long, ids)).encode()
        name = f"prefix-{hashlib.sha256(key).hexdigest()[:32]}{_SUFFIX}"
        given_up = time.monotonic() + _WAIT
        while True:
            files = self._of(facts)
            shared = max((common_length(file.ids, ids) for _, file in files), default=0)
            if len(ids) - shared < max(_READ_AT_LEAST, len(ids) // _NEW_PART):
                return
            with hold(self._directory) as mine:
                if mine:
                    if self._make_room(nbytes + _HEADER_BYTES + _TENSOR_BYTES * arrays):
                        write_cache(self._directory / name, facts, ids, layers)
                        for path, file in files:
                            if facts.start == 0 and file.ids == ids[: len(file.ids)]:
                                self._discard(path)
                    return
            if time.monotonic() > given_up:
                return
            time.sleep(_PAUSE)

    def _make_room(self, size: int) -> bool:
        """Remove what was not used longest until `size` bytes more are within the limit; whether they can be."""
        ours = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        ours.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        held = sum(size for _, size, _ in ours)
        for _, its_size, path in sorted(ours) if size <= self._limit else ():
            if held + size <= self._limit:
                break
            self._discard(path)
            held -= its_size
        return held + size <= self._limit

    def _of(self, facts: Facts) -> list[tuple[Path, _Known]]:
        """The files of the same model, packed so and in that LongRoPE regime."""
        looked_at: dict[tuple[str, int, int], _Known | None] = {}
        with self._looking, contextlib.suppress(OSError), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(OSError):
                        stat = entry.stat()
                        key = entry.name, stat.st_ino, stat.st_size
                        looked_at[key] = self._known[key] if key in self._known else self._look(Path(entry.path))
            self._known = looked_at
        return [
            (self._directory / name, file)
            for (name, _, _), file in looked_at.items()
            if file is not None
            and not file.damaged
            and (file.facts.model, file.facts.bits, file.facts.long) == (facts.model, facts.bits, facts.long)
        ]

    def _look(self, path: Path) -> _Known | None:
        try:
            facts = read_facts(path)
            return _Known(facts, read_ids(path, facts))
        except (CacheError, OSError):
            self._discard(path)
            return None

    def _discard(self, path: Path) -> None:
        """Remove a file if it has a name of ours."""
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _use(path: Path) -> None:
    """Note that a file was used now."""
    with contextlib.suppress(OSError):
        os.utime(path)
