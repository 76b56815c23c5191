"""Keys and values kept from run to run, in memory or in a file, so that a prefix is computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.cache_file import (
    Document,
    Facts,
    check_model,
    facts_of,
    is_cache,
    read_facts,
    read_layers,
    runs_of_cache,
    write_cache,
)
from ..engine.generation import Generation
from ..engine.identity import model_fingerprint
from ..engine.prefill import common_length
from ..engine.sampling import Sampling
from ..errors import CacheError, PromptError
from ..models.cache import KVBits, KVCache, make_kv_bits
from ..models.hooks import check_edits
from ..sizes import size_text
from ..store.atomic import check_file
from ..text.chat import render_chat
from ..threads import turn
from ..values import path as as_path
from ..values import shown, token_ids
from .loading import check_family, check_loaded

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

_REDONE = 16  # tokens at the end of a stored prefix that another continuation may tokenize differently


class PromptCache:
    """What a model has read, for the next prompt that begins alike.

        cache = PromptCache(model)
        generate(model, tokenizer, question_1, prompt_cache=cache)
        generate(model, tokenizer, question_2, prompt_cache=cache)  # reads only where the two differ

    `kv_bits` and `kv_group_size`, as `generate`'s, pack whatever is read with it. It serves one run at a time, of any
    thread, and holds what the last one read: what the next prompt does not begin with is dropped. A run that begins
    while another is not at its end takes the cache from it, and the other ends with a CacheError. `document` is kept in
    the file beside it. Raises OptionError for bits that cannot be.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int | None = None,
        document: Document | None = None,
    ):
        check_loaded(model)
        self._model, self.document = model, document
        self.bits = make_kv_bits(kv_bits, kv_group_size)
        self._layers: list[KVCache] | None = None
        self._beside: PromptCache | None = None

    def __repr__(self) -> str:
        return f"<PromptCache: {len(self.ids):,} tokens read, {size_text(self.nbytes)}>"

    @property
    def ids(self) -> list[int]:
        """The token ids it has read."""
        with turn():
            if not self._layers or not self._whole():
                return []
            return self._layers[0].sequence.ids[0, : self._layers[0].offset].tolist()  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers or ())

    def layers_for(self, model: Model) -> list[KVCache] | None:
        """The layers, for a run, which keeps what its prompt begins with; None if there is nothing to keep.

        Raises CacheError if `model` is another than the cache was made for, or edited otherwise (`trace`).
        """
        if model is not self._model:
            raise CacheError("this prompt cache belongs to another model; make one for each")
        with turn():
            if self._layers is None or not self._whole():
                return None
            check_edits(model.model, self._layers)
            return self._layers

    def keep(self, layers: list[KVCache]) -> None:
        """Hold these layers of a run; they grow as it does."""
        self._layers = layers

    def beside(self, draft_model: Model) -> PromptCache:
        """The cache of a draft model that reads what is read here; kept in memory alone, for the last such model."""
        if self._beside is None or self._beside._model is not draft_model:
            self._beside = PromptCache(draft_model)
            self._beside.bits = None if self.bits is None else self.bits.dividing(draft_model.config.head_dim)
        return self._beside

    def _whole(self) -> bool:
        """Whether the layers agree; a Ctrl-C can fall between two, or into the recomputation at a regime's boundary."""
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
        given = token_ids(ids)
        if given is None:
            raise PromptError(f"ids is {shown(ids)}; expected a list of token ids")
        generation = Generation(
            self._model,
            [given],
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

    @turn()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file `path`, whole or not at all. Raises CacheError, and OptionError for what names no file."""
        path = as_path(path, "path", "the name of a file")
        check_family(self._model, "a cache's file")
        if not self.ids:
            raise CacheError("this prompt cache has read nothing yet, so there is nothing to write")
        assert self._layers is not None
        if self._layers[0].lost:
            raise CacheError("a run that did not go on has cut this prompt cache behind its window; read() again")
        if self._layers[0].sequence.edits:
            raise CacheError("this prompt cache was read under edits of the model, which no file can hold; read anew")
        check_writable(path)
        try:
            write_cache(path, self._facts(), self.ids, runs_of_cache(self._layers))
        except OSError as error:
            raise CacheError(_unwritable(path, error)) from error

    def _facts(self) -> Facts:
        """What a file of it says."""
        first = (self._layers or [])[0]
        assert first.sequence.long is not None
        facts = facts_of(self._model, model_fingerprint(self._model), self.bits, first.sequence.long[0])
        return replace(facts, tokens=first.offset, start=first.start, document=self.document)

    @classmethod
    @turn()
    def load(cls, path: str | os.PathLike[str], model: Model) -> PromptCache:
        """The cache of a file of `save`. Raises CacheError for a damaged file or one of another model."""
        check_loaded(model)
        check_family(model, "a cache's file")
        path = as_path(path, "path", "the name of a file")
        facts = read_facts(path)
        check_model(path, facts, model)
        cache = cls(model, document=facts.document)
        cache.bits = facts.bits
        cache.keep(read_layers(path, facts, model))
        return cache

    def check_prefix(self, ids: Sequence[int], name: str) -> None:
        """Raise CacheError unless `ids` begin with what this cache, of the file `name`, has read."""
        known = self.ids
        shared = common_length(known, list(ids))
        if shared < len(known) - _REDONE:
            raise CacheError(
                f"the prompt does not begin as {name} does: they part after {shared:,} of its {len(known):,} tokens; "
                "rebuild the cache from this text, or leave it out"
            )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CacheError if no file of that name can be written, or one that is there is no prompt cache.

    Asked before a long text is read.
    """
    if Path(path).is_file() and Path(path).stat().st_size and not is_cache(path):
        raise CacheError(f"{path} is there and is no prompt cache, so it is not replaced; name another")
    try:
        check_file(path)
    except OSError as error:
        raise CacheError(_unwritable(path, error)) from error


def _unwritable(path: str | os.PathLike[str], error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror or error}); name a file in a folder that can be"


def read_document(path: str | os.PathLike[str]) -> tuple[Document, KVBits | None]:
    """The document of a prompt-cache file, and how its keys and values are packed. Raises CacheError."""
    facts = read_facts(path)
    if facts.document is None:
        raise CacheError(f"{path} holds no document; build one with `phi3-mlx cache build`")
    return facts.document, facts.bits


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
