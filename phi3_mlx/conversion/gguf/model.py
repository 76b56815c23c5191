"""A source as a GGUF file's tensors: the type of each, chosen from headers, and its bytes when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import mlx.core as mx
import numpy as np

from ...config import Config
from ..sources import OpenedSource, weights_of
from .carrying import Carrier
from .metadata import extra_tensors
from .rounding import encoded_rows, rows_a_chunk
from .sink import Encoder, GgufEntry, nbytes_of
from .tensor_names import llama_cpp_name
from .types import FILE_TYPES, fitting_kind, wanted_kind

_EMBEDDING_WEIGHT, _HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"
# By bits: the types that hold packed weights, the smaller first.
_OWN_KINDS = {2: ("Q4_1",), 3: ("Q4_1",), 4: ("Q4_0", "Q4_1"), 5: ("Q5_0", "Q5_1"), 8: ("Q8_0",)}


@dataclass(frozen=True)
class Carried:
    """How a tensor's packed weights go over: not at all (`rounded_again`), or with some of their scales rounded."""

    rounded_again: bool
    rounded_scales: int = 0


class GgufModel:
    """What is written of `source`: `entries` in order, and an `encoder` of their bytes.

    `file_type` is a key of `FILE_TYPES`; None: types that hold the source's own weights. `carried` says of each packed
    tensor, by llama.cpp's name, what becomes of its values; `fallen_back` names the tensors whose rows the blocks of
    the type that they should have do not divide, with that type.
    """

    def __init__(self, gguf: ModuleType, source: OpenedSource, file_type: str | None):
        self._gguf, self.source, self._file_type = gguf, source, file_type
        self.carried: dict[str, Carried] = {}
        self.fallen_back: dict[str, str] = {}
        self._extra = extra_tensors(source.config)
        self.entries = [self._entry(name, tensor.shape) for name, tensor in source.tensors.items()]
        if source.config.model_type == "phimoe" and _HEAD_WEIGHT not in source.tensors:
            embedding = source.tensors[_EMBEDDING_WEIGHT]  # llama.cpp ties no head there
            self.entries.append(self._entry(_EMBEDDING_WEIGHT, embedding.shape, "output.weight"))
        self.entries += [
            GgufEntry(name, tuple(array.shape), "F32", array.nbytes) for name, array in self._extra.items()
        ]

    @property
    def config(self) -> Config:
        return self.source.config

    @property
    def matrices(self) -> list[GgufEntry]:
        return [entry for entry in self.entries if len(entry.shape) > 1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(entry.nbytes for entry in self.entries) / weights_of(self.source)

    @property
    def file_number(self) -> int:
        """`general.file_type`: what was asked for, or what most of the bytes are."""
        if self._file_type is not None:
            return FILE_TYPES[self._file_type].number
        nbytes: Counter[str] = Counter()
        for entry in self.matrices:
            nbytes[entry.kind] += entry.nbytes
        most = nbytes.most_common(1)[0][0]
        return next(known.number for known in FILE_TYPES.values() if known.kind == most)

    def encoder(self, importance: Mapping[str, mx.array]) -> Encoder:
        """What gives the bytes of an entry, some rows at a time.

        `importance`, by the source's names of tensors, is how much the inputs of a matrix, or of each expert's, count.
        It raises CheckpointError for values that a type cannot hold.
        """
        return partial(self._encode, importance)

    def _encode(self, importance: Mapping[str, mx.array], entry: GgufEntry) -> Iterator[np.ndarray]:
        if entry.source is None:
            yield np.array(self._extra[entry.name])
            return
        if entry.name in self.carried and not self.carried[entry.name].rounded_again:
            yield from Carrier(self.source.blocks[entry.source]).rows(entry.kind)
            return
        array = self.source.read(entry.source)
        columns = importance.get(entry.source)
        rows = array.reshape(-1, array.shape[-1])
        del array
        step = rows_a_chunk(rows.shape[-1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            counts = None
            if columns is not None:
                counts = columns[mx.arange(first, first + len(part)) // entry.shape[-2]]
            yield encoded_rows(self._gguf, part, entry.kind, entry.source, counts)
        del rows, part
        mx.clear_cache()

    def _entry(self, name: str, shape: tuple[int, ...], written_as: str | None = None) -> GgufEntry:
        written_as = written_as or llama_cpp_name(name)
        kind = self._kind(name, written_as, shape)
        return GgufEntry(written_as, shape, kind, nbytes_of(self._gguf, shape, kind), name)

    def _kind(self, name: str, written_as: str, shape: tuple[int, ...]) -> str:
        """The type of a tensor; notes what becomes of its packed values, and where the blocks do not fit."""
        blocks = self.source.blocks.get(name)
        carrier = Carrier(blocks) if blocks is not None and blocks.packing["mode"] == "affine" else None
        config = self.source.config
        layers, tied = config.num_hidden_layers, config.tie_word_embeddings
        wanted = wanted_kind(written_as, shape, self._file_type or "f16", layers, tied=tied)
        if wanted != "F32" and self._file_type is None:
            wanted = self._own_kind(name, carrier)
        elif wanted != "F32" and carrier is not None and carrier.holds(FILE_TYPES[str(self._file_type)].kind):
            wanted = FILE_TYPES[str(self._file_type)].kind  # more bits would round it again
        kind = fitting_kind(wanted, shape[-1])
        if kind != wanted:
            self.fallen_back[written_as] = wanted
        if kind != "F32" and self.source.float_type(name) is None:  # float32 holds what is packed
            holds = carrier is not None and carrier.holds(kind)
            self.carried[written_as] = Carried(not holds, carrier.rounded_scales() if carrier and holds else 0)
        return kind

    def _own_kind(self, name: str, carrier: Carrier | None) -> str:
        """The type for a source's own weights."""
        floats = self.source.float_type(name)
        if floats is not None:
            return floats
        kinds = _OWN_KINDS.get(carrier.bits, ()) if carrier is not None else ()
        return next((kind for kind in kinds if carrier is not None and carrier.holds(kind)), "Q8_0")
