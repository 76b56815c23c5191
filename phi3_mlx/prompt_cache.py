"""Keys and values kept from run to run, in memory or in a file: what was read once is not read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .atomic import check_file, new_file
from .chat import render_chat
from .engine import Generation, common_length
from .errors import CacheError, CheckpointError
from .files import json_text, open_file
from .generation import check_loaded, make_kv_bits
from .memory import size_text
from .models.cache import KVBits, KVCache
from .safetensors import read_header
from .sampling import Sampling

if TYPE_CHECKING:
    from .models.decoder import Model
    from .tokenizer import Tokenizer

_FORMAT = "phi3-mlx prompt cache 3"
_SUMMED = 1 << 22  # numbers of a weight whose sums are taken at a time
_REDONE = 16  # tokens at the end of a stored prefix that another continuation may tokenize differently


@dataclass(frozen=True)
class Document:
    """A text that questions are asked about, the system message they are asked under, and the model that read it.

    `model` is what was given to name it, a directory by its whole path.
    """

    text: str
    system: str | None = None
    model: str | None = None


class PromptCache:
    """What a model has read, for the next prompt that begins alike.

        cache = PromptCache(model)
        generate(model, tokenizer, question_1, prompt_cache=cache)
        generate(model, tokenizer, question_2, prompt_cache=cache)  # reads only where the two differ

    `kv_bits` and `kv_group_size`, as `generate`'s, pack whatever is read with it. It serves one run at a time and holds
    what the last one read: what the next prompt does not begin with is dropped. `document` is kept in the file beside
    it. Raises OptionError for bits that cannot be.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 32,
        document: Document | None = None,
    ):
        check_loaded(model)
        self._model, self.document = model, document
        self.bits = make_kv_bits(kv_bits, kv_group_size)
        self._layers: list[KVCache] | None = None

    def __repr__(self) -> str:
        return f"<PromptCache: {len(self.ids):,} tokens read, {size_text(self.nbytes)}>"

    @property
    def ids(self) -> list[int]:
        """The token ids it has read."""
        if not self._layers or not self._whole():
            return []
        return self._layers[0].sequence.ids[0, : self._layers[0].offset].tolist()  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers or ())

    def layers_for(self, model: Model) -> list[KVCache] | None:
        """The layers, for a run, which keeps what its prompt begins with; None if there is nothing to keep.

        Raises CacheError if `model` is another than the cache was made for.
        """
        if model is not self._model:
            raise CacheError("this prompt cache belongs to another model; make one for each")
        return self._layers if self._layers is not None and self._whole() else None

    def keep(self, layers: list[KVCache]) -> None:
        """Hold these layers of a run; they grow as it does."""
        self._layers = layers

    def _whole(self) -> bool:
        """Whether the layers agree; a Ctrl-C can fall between two, or into the rereading at a regime's boundary."""
        layers = self._layers or []
        if not layers[0].offset or layers[0].sequence.long is None:
            return False
        return all(layer.offset == layers[0].offset and not layer.empty() for layer in layers)

    def read(
        self, ids: Sequence[int], *, force: bool = False, on_prefill: Callable[[int, int], None] | None = None
    ) -> None:
        """Read `ids` now, so that a prompt that begins with them need not.

        `force` and `on_prefill` are `stream_generate`'s. Raises PromptError or MemoryLimitError.
        """
        generation = Generation(
            self._model,
            [ids],
            max_tokens=1,
            sampling=Sampling(),
            cache=self.layers_for(self._model),
            kv_bits=self.bits,
            force=force,
            kept=True,
            on_prefill=on_prefill,
        )
        self.keep(generation.cache)
        for _ in generation:
            pass

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file `path`, whole or not at all. Raises CacheError."""
        if not self.ids:
            raise CacheError("this prompt cache has read nothing yet, so there is nothing to write")
        assert self._layers is not None
        first = self._layers[0]
        arrays = {"ids": mx.array(self.ids, dtype=mx.int32)}
        for i, layer in enumerate(self._layers):
            # With their free slots: without, each would be a copy, and all copies are made before any is written.
            arrays |= {f"{i}.{j}": array for j, array in enumerate(layer.state)}
        bits = self.bits
        facts = {
            "format": _FORMAT,
            "model": fingerprint(self._model),
            "options": _options(self._model),
            "tokens": first.offset,
            "start": first.start,
            "long": first.sequence.long,
            "kv_bits": None if bits is None else [bits.keys, bits.values, bits.group_size],
            "document": None if self.document is None else list(astuple(self.document)),
        }
        check_writable(path)
        try:
            with new_file(path) as file:
                mx.save_safetensors(file, arrays, {"phi3-mlx": json_text(facts)})
        except OSError as error:
            raise CacheError(_unwritable(path, error)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model) -> PromptCache:
        """The cache of a file of `save`. Raises CacheError for a damaged file or one of another model."""
        check_loaded(model)
        facts = read_facts(path)
        try:
            cache = cls(model, document=Document(*facts["document"]) if facts["document"] else None)
            _check_model(path, facts, cache.document, model)
            read_header(Path(path))  # truncated files are found here
            cache.bits = None if facts["kv_bits"] is None else KVBits(*facts["kv_bits"])
            cache.keep(_layers_of(path, facts, model.make_cache(bits=cache.bits)))
        except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CacheError(f"{path} is damaged; build it anew with `phi3-mlx cache build`") from error
        return cache

    def check_prefix(self, ids: Sequence[int], name: str) -> None:
        """Raise CacheError unless `ids` begin with what this cache, of the file `name`, has read."""
        known = self.ids
        shared = common_length(known, ids)
        if shared < len(known) - _REDONE:
            raise CacheError(
                f"the prompt does not begin as {name} does: they part after {shared:,} of its {len(known):,} tokens; "
                "build the cache anew from this text, or leave it out"
            )


def _check_model(path: str | os.PathLike[str], facts: dict[str, Any], document: Document | None, model: Model) -> None:
    """Raise CacheError unless `model` is the one that read what the file holds."""
    for name, value in _options(model).items():
        if (made := facts["options"][name]) != value:
            raise CacheError(
                f"{path} was made with {name}={made}, and this model has {name}={value}; load it with {name}={made}, "
                "or build the cache anew"
            )
    if facts["model"] != fingerprint(model):
        whose = document.model if document and document.model else "another model"
        raise CacheError(
            f"{path} is of {whose}, and this model is another or has other weights; give the model that it was built "
            "with, or build it anew with `phi3-mlx cache build`"
        )


def _layers_of(path: str | os.PathLike[str], facts: dict[str, Any], layers: list[KVCache]) -> list[KVCache]:
    """Empty layers, filled from a file of `save`."""
    arrays: dict[str, mx.array] = mx.load(os.fspath(path), format="safetensors")  # type: ignore[assignment]
    for i, layer in enumerate(layers):
        layer.state = [arrays[f"{i}.{j}"] for j in range(2 if layer.bits is None else 6)]
        layer.offset, layer.start = facts["tokens"], facts["start"]
    sequence = layers[0].sequence
    sequence.read(arrays["ids"][None], 0)
    sequence.long = tuple(facts["long"])
    mx.eval([layer.state for layer in layers], sequence.ids)
    return layers


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CacheError if no file of that name can be written, or one that is there is no prompt cache.

    Asked before a long text is read.
    """
    if Path(path).is_file() and Path(path).stat().st_size:
        try:
            read_facts(path, any_version=True)
        except CacheError as error:
            raise CacheError(f"{path} is there and is no prompt cache, so it is not replaced; name another") from error
    try:
        check_file(path)
    except OSError as error:
        raise CacheError(_unwritable(path, error)) from error


def _unwritable(path: str | os.PathLike[str], error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror or error}); name a file in a folder that can be"


def read_facts(path: str | os.PathLike[str], *, any_version: bool = False) -> dict[str, Any]:
    """What a prompt-cache file says of itself. Raises CacheError, for another version's too unless `any_version`."""
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100_000_000)))
        facts = json.loads(header["__metadata__"]["phi3-mlx"])
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}; build it with `phi3-mlx cache build`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is no prompt cache, or is damaged; build it with `phi3-mlx cache build`") from error
    if facts.get("format") != _FORMAT and not any_version:
        raise CacheError(f"{path} is of another version of phi3-mlx; build it anew with `phi3-mlx cache build`")
    return facts


def read_document(path: str | os.PathLike[str]) -> tuple[Document, KVBits | None]:
    """The document of a prompt-cache file, and how its keys and values are packed. Raises CacheError."""
    facts = read_facts(path)
    if not facts["document"]:
        raise CacheError(f"{path} holds no document; build one with `phi3-mlx cache build`")
    return Document(*facts["document"]), None if facts["kv_bits"] is None else KVBits(*facts["kv_bits"])


def about_document(text: str, question: str) -> str:
    """The message that asks `question` about a document."""
    return f"{text.strip()}\n\n{question.strip()}"


def document_ids(tokenizer: Tokenizer, document: Document, *, notify: Callable[[str], None] | None = None) -> list[int]:
    """The token ids with which every prompt about the document begins."""
    system = [{"role": "system", "content": document.system}] if document.system else []
    first, second = (
        render_chat(
            tokenizer, [*system, {"role": "user", "content": about_document(document.text, question)}], notify=say
        )
        for question, say in (("Why?", notify), ("a", None))
    )
    return first[: common_length(first, second)]


def _options(model: Model) -> dict[str, str]:
    """How the model was loaded, as far as it changes what is read."""
    return {"longrope": model.model.longrope, "dtype": str(model.dtype).removeprefix("mlx.core.")}


def fingerprint(model: Model) -> str:
    """Tells models apart by config, names, shapes, types and every number: sums of rows and of columns."""
    digest = hashlib.sha256(repr((model.config, model.model.longrope)).encode())
    for name, array in tree_flatten(model.parameters()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        flat = array.reshape(-1, array.shape[-1]).view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
        columns = mx.zeros(flat.shape[1], mx.uint32)
        step = max(1, _SUMMED // flat.shape[1])
        for first in range(0, len(flat), step):
            bits = flat[first : first + step].astype(mx.uint32)
            columns, rows = columns + bits.sum(axis=0), bits.sum(axis=1)  # of integers: no order changes them
            mx.eval(columns, rows)
            digest.update(np.array(rows).tobytes())
        digest.update(np.array(columns).tobytes())
    return digest.hexdigest()[:32]
