"""Prefixes in the files of a directory, which several processes may share: one file, in the format of `cache build`,
holds all that was read from the first token on.

Only files that have a name of ours are ever removed: damaged ones, those that another goes on from, and, where the
directory holds too much, what was not used longest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CacheError
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from ..store.atomic import hold
from .cache_file import Facts, read_facts, read_ids, read_layers, write_cache
from .identity import ModelState
from .prefill import common_length

_SUFFIX = ".cache"
_OURS = re.compile(rf"prefix-[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
_READ_AT_LEAST = 64  # tokens that a file must spare: it is read and checked as a whole
_NEW_PART = 4  # a file is written once a part of this many of its tokens is in none: an answer after another is not
_HEADER_BYTES, _TENSOR_BYTES = 1 << 16, 200  # at most, of what a file holds beside arrays


@dataclass
class _Known:
    """A file that was looked at: what it says of itself, its ids, and whether its contents were others."""

    facts: Facts
    ids: list[int]
    damaged: bool = False


class PrefixFiles:
    """The files of `directory`, which is made, with at most `limit` bytes in those that this class writes.

    `error` is the last one that kept a file from being written. Raises CacheError if there can be no such directory.
    """

    def __init__(self, directory: Path, limit: int):
        self._directory, self._limit = directory, limit
        self._known: dict[tuple[str, int, int], _Known | None] = {}  # by name, inode and size; None: of no use
        self.error: OSError | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with os.scandir(directory):
                pass
        except OSError as error:
            raise CacheError(f"{directory} cannot be used ({error.strerror or error}); name a folder") from error

    def find(
        self, model: Model, state: ModelState, prompt: list[int], bits: KVBits | None, known: int
    ) -> list[KVCache] | None:
        """A cache with the longest beginning of a prompt that a file has, if it is much longer than `known` tokens."""
        window, most = model.config.sliding_window, len(prompt) - 1
        files = self._of(state.fingerprint(model), bits, model.model.is_long(len(prompt)))
        by_length = [(min(common_length(file.ids, prompt), most), path, file) for path, file in files]
        for shared, path, file in sorted(by_length, key=lambda item: item[0], reverse=True):
            if shared < known + _READ_AT_LEAST:
                return None
            if file.facts.start > (0 if window is None else max(0, shared - (window - 1))):
                continue  # its window has gone on
            try:
                cache = read_layers(path, file.facts, model, tokens=shared, expected=len(prompt))
            except (CacheError, RuntimeError, OSError):  # MLX raises the second where a file is cut while it is read
                file.damaged = True
                self._discard(path)
                continue
            if cache[0].sequence.ids[0].tolist() == prompt[:shared]:
                with contextlib.suppress(OSError):
                    os.utime(path)
                return cache
        return None

    def write(self, model: Model, state: ModelState, cache: list[KVCache]) -> None:
        """Keep what a cache has read, if much of it is in no file yet. A fault is noted, and never raised."""
        sequence, bits, first = cache[0].sequence, cache[0].bits, cache[0]
        assert sequence.long is not None
        ids: list[int] = sequence.ids[0, : first.offset].tolist()  # type: ignore[assignment]
        files = self._of(state.fingerprint(model), bits, sequence.long[0])
        shared = max((common_length(file.ids, ids) for _, file in files), default=0)
        if first.lost or len(ids) - shared < max(_READ_AT_LEAST, len(ids) // _NEW_PART):
            return
        arrays = sum(len(layer.state) for layer in cache)
        size = sum(layer.nbytes for layer in cache) + 4 * len(ids) + _HEADER_BYTES + _TENSOR_BYTES * arrays
        key = repr((state.fingerprint(model), bits, sequence.long, ids)).encode()
        name = f"prefix-{hashlib.sha256(key).hexdigest()[:32]}{_SUFFIX}"
        try:
            with hold(self._directory) as mine:
                if mine and self._make_room(size):
                    write_cache(self._directory / name, model, state.fingerprint(model), cache, None)
                    for path, file in files:
                        if first.start == 0 and file.ids == ids[: len(file.ids)]:
                            self._discard(path)
        except OSError as error:
            self.error = error

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

    def _of(self, fingerprint: str, bits: KVBits | None, long: bool) -> list[tuple[Path, _Known]]:
        """The files of a model, packed so and in that LongRoPE regime."""
        looked_at: dict[tuple[str, int, int], _Known | None] = {}
        with contextlib.suppress(OSError), os.scandir(self._directory) as entries:
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
            and (file.facts.model, file.facts.bits, file.facts.long) == (fingerprint, bits, long)
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
