"""Token shards: texts as ids on disk, memory-mapped, so that a run reads a corpus of any size in little memory.

DIR/
  tokens.json       the header: what tokenizer, how many documents, tokens and characters, which files, a hash of all
  documents.bin     uint32 (documents, 2): tokens and characters of each document
  tokens-00000.bin  uint16 or uint32 (tokens,): the ids of whole documents, one after the other; then tokens-00001.bin

All little-endian. A document's ids are what `tune` would learn of {"text": ...}: BOS if the tokenizer adds one, the
text, and the end of the text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..config import read_json
from ..errors import CheckpointError, DataError
from ..fields import Fields
from ..files import json_text
from ..paths import expanded

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

HEADER, DOCUMENTS = "tokens.json", "documents.bin"
_SHARDS_FORMAT = "phi3-mlx tokens"
_PAIR = np.dtype("<u4")
_SHARD_TOKENS = 1 << 28  # 512 MB or 1 GB
_FINGERPRINTED = "A probe: 3.14 Ünïcode, <|end|> and\n\n  spaces."
_MAKE = "make it again with `phi3-mlx data tokenize`"


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary and of what the tokenizer makes of a text."""
    digest = hashlib.sha256()
    for number in range(tokenizer.vocab_size):
        digest.update(f"{tokenizer.id_to_token(number)!r}\n".encode())
    probe = tokenizer.encode(_FINGERPRINTED, special=True), tokenizer.add_bos_token, tokenizer.eos_token_id
    digest.update(repr(probe).encode())
    return digest.hexdigest()[:32]


class ShardWriter:
    """Writes documents into a folder, one after the other; `finish` writes the header, without which there are none.

    `shards` says of each file of ids its name, and how many tokens and documents it has. Equal documents in the same
    order make equal files, however they are added.
    """

    def __init__(self, folder: Path, vocab_size: int, files: ExitStack):
        self._folder, self._vocab_size, self._files = folder, vocab_size, files
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._documents = files.enter_context((folder / DOCUMENTS).open("wb"))
        self._shard: BinaryIO | None = None
        self._digests = hashlib.sha256(), hashlib.sha256()  # of sizes, and of ids
        self.shards: list[dict[str, Any]] = []
        self.documents = self.tokens = self.characters = 0

    def add(self, ids: np.ndarray, characters: int) -> None:
        """A document's ids, and how many characters its text has."""
        self._extend(ids.astype(self._dtype), np.array([[len(ids), characters]], _PAIR))

    def take(self, folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
        """Add the documents that another writer put into `folder`, of the same vocabulary; `shards` are that one's."""
        first = 0
        for shard in shards:
            ids = np.memmap(folder / shard["file"], self._dtype, "r")
            count, offset = shard["documents"], 2 * _PAIR.itemsize * first
            self._extend(ids, np.memmap(folder / DOCUMENTS, _PAIR, "r", offset, (count, 2)))
            first += count

    def finish(self, fingerprint: str) -> None:
        """Write the header; `fingerprint`: the tokenizer's."""
        header = {
            "format": _SHARDS_FORMAT,
            "version": 1,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "documents": self.documents,
            "tokens": self.tokens,
            "characters": self.characters,
            "tokenizer": {"fingerprint": fingerprint, "size": self._vocab_size},
            "sha256": hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest(),
            "shards": self.shards,
        }
        (self._folder / HEADER).write_text(json_text(header, indent=1) + "\n", encoding="utf-8")

    def _extend(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Write documents whose ids follow each other; `sizes` (documents, 2). Each is whole in a file."""
        ends = np.cumsum(sizes[:, 0], dtype=np.int64)
        first = start = 0  # the next document, and its first token
        while first < len(sizes):
            room = _SHARD_TOKENS - self.shards[-1]["tokens"] if self.shards else 0
            end = int(np.searchsorted(ends, start + room, side="right"))
            if end <= first:
                self._begin()
                end = max(first + 1, int(np.searchsorted(ends, start + _SHARD_TOKENS, side="right")))
            self._write(ids[start : ends[end - 1]], sizes[first:end])
            first, start = end, int(ends[end - 1])

    def _begin(self) -> None:
        """The next file of ids."""
        if self._shard is not None:
            self._shard.close()
        name = f"tokens-{len(self.shards):05d}.bin"
        self._shard = self._files.enter_context((self._folder / name).open("wb"))
        self.shards.append({"file": name, "tokens": 0, "documents": 0})

    def _write(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        assert self._shard is not None
        for content, file, digest in zip((sizes, ids), (self._documents, self._shard), self._digests, strict=True):
            octets = np.ascontiguousarray(content).view(np.uint8).data
            file.write(octets)
            digest.update(octets)
        self.shards[-1]["tokens"] += len(ids)
        self.shards[-1]["documents"] += len(sizes)
        self.documents, self.tokens = self.documents + len(sizes), self.tokens + len(ids)
        self.characters += int(sizes[:, 1].sum(dtype=np.int64))


class TokenShards:
    """The documents of a folder of token shards; opening reads the header and the documents' sizes alone.

    `lengths` and `characters` (documents,) are those of each document. Raises DataError for a folder without shards,
    and for files that are not as the header says.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = expanded(directory)
        try:
            header = Fields(read_json(self.directory / HEADER), self.directory / HEADER, DataError)
        except CheckpointError as error:
            there = (self.directory / HEADER).is_file()
            fault = str(error) if there else f"{self.directory} has no {HEADER}"
            raise DataError(f"{fault}; `phi3-mlx data tokenize` makes token shards of texts") from error
        if header.raw.get("format") != _SHARDS_FORMAT or header.raw.get("version") != 1:
            raise DataError(f"{header.source} is no header of token shards of this version; {_MAKE}")
        dtype = np.dtype("<u4" if header.text("dtype") == "uint32" else "<u2")
        self.fingerprint = header.text("sha256")
        self.tokenizer = header.fields("tokenizer").text("fingerprint")
        documents = header.whole("documents", least=1, most=2**31 - 1)
        sizes = self._mapped(DOCUMENTS, _PAIR, 2 * documents).reshape(-1, 2)
        self.lengths, self.characters = sizes[:, 0], sizes[:, 1]
        self._shards = [
            self._mapped(Path(shard.text("file")).name, dtype, shard.whole("tokens", least=1, most=2**40))
            for shard in (Fields(raw, header.source, DataError) for raw in self._listed(header))
        ]
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self._starts = ends - self.lengths
        self._firsts = np.cumsum([0, *map(len, self._shards)])[:-1]  # tokens before each file
        if int(ends[-1]) != sum(map(len, self._shards)) or not self.lengths.all():
            raise DataError(f"{self.directory}: {DOCUMENTS} is not that of these tokens; {_MAKE}")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, first: int, count: int) -> np.ndarray:
        """`count` ids of a document from its id `first` on, int32 (count,)."""
        start = int(self._starts[document])
        shard = int(np.searchsorted(self._firsts, start, side="right")) - 1
        start += first - int(self._firsts[shard])
        return np.array(self._shards[shard][start : start + count], np.int32)

    def first_ids(self, documents: np.ndarray) -> np.ndarray:
        """The first id of each of some documents, int64 (documents,)."""
        starts = self._starts[documents]
        files = np.searchsorted(self._firsts, starts, side="right") - 1
        ids = np.zeros(len(documents), np.int64)
        for file in np.unique(files):
            ids[files == file] = self._shards[file][starts[files == file] - self._firsts[file]]
        return ids

    def _listed(self, header: Fields) -> list[dict[str, Any]]:
        shards = header.raw.get("shards")
        if not isinstance(shards, list) or not shards or not all(isinstance(shard, dict) for shard in shards):
            raise DataError(f"{header.source} lists no shards; {_MAKE}")
        return shards

    def _mapped(self, name: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        path = self.directory / name
        try:
            size = path.stat().st_size
            if size == count * dtype.itemsize:
                return np.memmap(path, dtype, "r")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {_MAKE}") from error
        raise DataError(f"{path} has {size:,} bytes, expected {count * dtype.itemsize:,}; {_MAKE}")
