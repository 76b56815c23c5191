"""A prompt cache as a file: what it says of itself, checked against its arrays and the model before any of it is used.

It is a safetensors file of the layers' arrays and the token ids, with the facts as JSON in its metadata. Among these
is a digest of facts and arrays: a changed position or regime would fit the arrays and give other answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import CacheError, CheckpointError, OptionError
from ..fields import Fields, parse, shorten
from ..files import json_text, open_file
from ..models.cache import KVBits, KVCache
from ..store.atomic import new_file
from ..store.checkpoint import read_arrays
from ..store.safetensors import Tensor, header_of, read_header, read_metadata
from .identity import model_fingerprint

if TYPE_CHECKING:
    from ..models.decoder import Model

_FORMAT_NAME = "phi3-mlx prompt cache"
_FORMAT = f"{_FORMAT_NAME} 4"
_KEY = "phi3-mlx"  # of the metadata
_ANEW = "rebuild it with `phi3-mlx cache build`"
_FLOATS = ("F32", "BF16", "F16")
_SPELLED = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}


@dataclass(frozen=True)
class Document:
    """A text that questions are asked about, the system message they are asked under, and the model that read it.

    `model` is what was given to name it, a directory by its whole path.
    """

    text: str
    system: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a file says: of the model that read (its `fingerprint`, how it was loaded), and of what was read.

    `start` is the position of the first slot, `long` the LongRoPE regime, `digest` what `digest_of` gives for the rest.
    """

    model: str
    longrope: str
    dtype: str
    tokens: int
    start: int
    long: bool
    bits: KVBits | None
    document: Document | None
    digest: str = ""


def facts_of(model: Model, fingerprint: str, bits: KVBits | None, long: bool) -> Facts:
    """What a file says of the model that reads, before it has read a token. `fingerprint` is the model's."""
    return Facts(fingerprint, **_options(model), tokens=0, start=0, long=long, bits=bits, document=None)


class Slots(NamedTuple):
    """The slots `first:last` of a layer's arrays, each (1, Hkv, slots, D), which are computed and lie in row order."""

    arrays: Sequence[mx.array]
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes of these slots."""
        return sum(array.nbytes // array.shape[2] for array in self.arrays) * (self.last - self.first)

    @property
    def slices(self) -> list[mx.array]:
        """Of each array these slots, as `KVCache.begin_with` takes them."""
        return [array[..., self.first : self.last, :] for array in self.arrays]


def runs_of_cache(layers: Sequence[KVCache]) -> list[list[Slots]]:
    """What each layer of a cache of one row has read."""
    kept = [[mx.contiguous(array) for array in layer.state] for layer in layers]
    mx.eval(kept)
    return [[Slots(arrays, 0, layer.offset - layer.start)] for arrays, layer in zip(kept, layers, strict=True)]


def write_cache(
    path: str | os.PathLike[str], facts: Facts, ids: Sequence[int], layers: Sequence[Sequence[Slots]]
) -> None:
    """Write the file of `facts`, whole or not at all: `ids` (tokens,), and of each layer the runs of its tokens.

    Arrays go to the file as they lie in memory, and nothing is computed, so any thread may do it. Raises OSError.
    """
    tensors = {"ids": _Stored("I32", (len(ids),), mx.int32)}
    for i, runs in enumerate(layers):
        slots = sum(run.last - run.first for run in runs)
        for j, array in enumerate(runs[0].arrays):
            shape = (*array.shape[:2], slots, array.shape[3])
            tensors[f"{i}.{j}"] = _Stored(_SPELLED[array.dtype], shape, array.dtype)
    listed = {name: Tensor(each.spelling, each.shape, each.nbytes) for name, each in tensors.items()}
    sums: dict[str, str] = {}
    with new_file(path) as file:
        file.write(header_of(listed, _metadata(facts, "0" * 64)))
        for name, each in tensors.items():
            crc = 0
            for piece in [_bytes_of_ids(ids)] if name == "ids" else _pieces(layers, name):
                crc = zlib.crc32(piece, crc)
                file.write(piece)
            sums[name] = _sum_text(each.shape, each.dtype, crc)
        file.seek(0)  # the digest stands in front, and is known now
        file.write(header_of(listed, _metadata(facts, _digest(facts, sums))))


class _Stored(NamedTuple):
    """A tensor to write: its type in safetensors' spelling, its shape, its type."""

    spelling: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def _bytes_of_ids(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def _pieces(layers: Sequence[Sequence[Slots]], name: str) -> Iterator[memoryview]:
    """The bytes of the tensor `name` ("layer.array"), head after head, as its runs have them."""
    layer, place = map(int, name.split("."))
    views = [(memoryview(run.arrays[place]).cast("B"), run) for run in layers[layer]]  # type: ignore[arg-type]
    heads = layers[layer][0].arrays[place].shape[1]
    for head in range(heads):
        for view, run in views:
            slots = run.arrays[place].shape[2]
            width = len(view) // (heads * slots)
            yield view[(head * slots + run.first) * width : (head * slots + run.last) * width]


def metadata_of(facts: Facts, arrays: Mapping[str, mx.array]) -> dict[str, str]:
    """The metadata of the file that holds `arrays`."""
    return _metadata(facts, digest_of(facts, arrays))


def _metadata(facts: Facts, digest: str) -> dict[str, str]:
    return {_KEY: json_text(asdict(facts) | {"format": _FORMAT, "digest": digest})}


def digest_of(facts: Facts, arrays: Mapping[str, mx.array]) -> str:
    """Tells whether a fact or a number was changed since they were written."""
    return _digest(facts, {name: _summed(array) for name, array in arrays.items()})


def _digest(facts: Facts, sums: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(facts) | {"digest": ""}, sort_keys=True).encode())
    for name, text in sorted(sums.items()):
        digest.update(f"{name} {text}".encode())
    return digest.hexdigest()


def _summed(array: mx.array) -> str:
    crc = zlib.crc32(memoryview(mx.contiguous(array)))  # type: ignore[arg-type]  # 2.5 times as fast as SHA-256
    return _sum_text(array.shape, array.dtype, crc)


def _sum_text(shape: tuple[int, ...], dtype: mx.Dtype, crc: int) -> str:
    return f"{shape} {dtype} {crc}"


def is_cache(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a prompt cache, perhaps of another version or cut short."""
    try:
        return _version(path)[0].startswith(_FORMAT_NAME)
    except CacheError:
        return False


def read_facts(path: str | os.PathLike[str]) -> Facts:
    """What a prompt-cache file says of itself. Raises CacheError."""
    version, facts = _version(path)
    if version != _FORMAT:
        raise CacheError(f"{path} is of another version of phi3-mlx; {_ANEW}")
    facts.all_of(*(field.name for field in fields(Facts)), "format")
    bits = document = None
    if facts.raw["bits"] is not None:
        packed = facts.fields("bits").all_of("keys", "values", "group_size")
        try:
            bits = KVBits(packed.whole("keys"), packed.whole("values"), packed.whole("group_size"))
        except OptionError as error:
            raise CacheError(f"{path} is damaged ({error}); {_ANEW}") from error
    if facts.raw["document"] is not None:
        given = facts.fields("document").all_of("text", "system", "model")
        system = None if given.raw["system"] is None else given.text("system")
        model = None if given.raw["model"] is None else given.path("model")
        document = Document(given.text("text"), system, model)
    return Facts(
        model=facts.text("model"),
        longrope=facts.text("longrope"),
        dtype=facts.text("dtype"),
        tokens=facts.whole("tokens", least=1),
        start=facts.whole("start"),
        long=facts.flag("long"),
        bits=bits,
        document=document,
        digest=facts.text("digest"),
    )


def _version(path: str | os.PathLike[str]) -> tuple[str, Fields]:
    """The format that a file has, and all it says of itself."""
    try:
        open_file(path).close()
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}; build it with `phi3-mlx cache build`") from error
    try:
        facts = parse(read_metadata(Path(path)).get(_KEY, ""))
    except (CheckpointError, ValueError) as error:
        raise CacheError(f"{path} is no prompt cache, or is damaged; {_ANEW}") from error
    given = Fields(facts if isinstance(facts, dict) else {}, path, CacheError, _ANEW)
    return given.text("format"), given


def check_model(path: str | os.PathLike[str], facts: Facts, model: Model) -> None:
    """Raise CacheError unless `model` is the one that read what the file holds."""
    for name, value in _options(model).items():
        if (made := getattr(facts, name)) != value:
            made = shorten(made, quote=False)
            raise CacheError(
                f"{path} was made with {name}={made}, and this model has {name}={value}; load it with {name}={made}, "
                "or rebuild the cache"
            )
    if facts.model != model_fingerprint(model):
        whose = facts.document.model if facts.document and facts.document.model else "another model"
        raise CacheError(
            f"{path} is of {whose}, and this model is another or has other weights; give the model that it was built "
            "with, or rebuild it with `phi3-mlx cache build`"
        )


def read_ids(path: str | os.PathLike[str], facts: Facts) -> list[int]:
    """The token ids of a file, which nothing vouches for until its layers are read. Raises CacheError."""
    try:
        stored = read_header(Path(path)).get("ids")
        if stored is None or (stored.dtype, stored.shape) != ("I32", (facts.tokens,)):
            raise CacheError(f"{path} is damaged (ids is not what it says); {_ANEW}")
        ids: list[int] = read_arrays(Path(path))["ids"].tolist()  # type: ignore[assignment]
    except (CheckpointError, RuntimeError) as error:
        raise CacheError(f"{path} is damaged; {_ANEW}") from error
    return ids


def read_layers(
    path: str | os.PathLike[str], facts: Facts, model: Model, *, tokens: int | None = None, expected: int | None = None
) -> list[KVCache]:
    """A cache for `model`, filled from a file. Raises CacheError where anything in it contradicts the rest.

    `tokens`: how many of the first to keep, in a cache for a prompt of `expected` tokens; of the others one layer is in
    memory at a time.
    """
    try:
        layers = model.make_cache(None if expected is None else [expected], bits=facts.bits)
        stored = read_header(Path(path))
        fault = _fault(facts, stored, model, layers[0])
        arrays = read_arrays(Path(path))
    except (CheckpointError, OptionError) as error:
        raise CacheError(f"{path} is damaged; {_ANEW}") from error
    if fault is None:
        read = facts.tokens if tokens is None else tokens
        sequence, sums = layers[0].sequence, {"ids": _summed(arrays["ids"])}
        sequence.read(arrays["ids"][None, :read], 0)
        sequence.long = (facts.long,)
        for i, layer in enumerate(layers):
            names = [f"{i}.{j}" for j in range(len(_parts(model, facts.bits)))]
            state = [arrays.pop(name) for name in names]
            sums |= {name: _summed(array) for name, array in zip(names, state, strict=True)}
            if tokens is None:
                layer.state, layer.offset, layer.start = state, facts.tokens, facts.start
            else:
                first = max(facts.start, layer.first_kept(tokens))
                layer.begin_with(
                    [[array[..., first - facts.start : tokens - facts.start, :] for array in state]], first
                )
        if _digest(facts, sums) != facts.digest:
            fault = "its contents are not those that were written"
    if fault is not None:
        raise CacheError(f"{path} is damaged ({fault}); {_ANEW}")
    ids: list[int] = sequence.ids[0].tolist()  # type: ignore[assignment]
    if not all(0 <= token < model.config.vocab_size for token in ids):
        raise CacheError(f"{path} is damaged (it has token ids beyond the model's vocabulary); {_ANEW}")
    mx.eval([layer.state for layer in layers], sequence.ids)
    return layers


def _fault(facts: Facts, stored: Mapping[str, Tensor], model: Model, layer: KVCache) -> str | None:
    """What of a file's facts and header contradicts the rest or the model."""
    config, parts = model.config, _parts(model, facts.bits)
    first = stored.get("0.0")
    slots = first.shape[2] if first is not None and len(first.shape) == 4 else 0
    expected = {"ids": ((facts.tokens,), ("I32",))} | {
        f"{i}.{j}": ((1, config.num_key_value_heads, slots, width), dtypes)
        for i in range(config.num_hidden_layers)
        for j, (width, dtypes) in enumerate(parts)
    }
    for name in [*expected, *stored]:
        if name not in stored or name not in expected:
            return f"{shorten(name, quote=False)} is {'missing' if name in expected else 'none of its arrays'}"
        tensor, (shape, dtypes) = stored[name], expected[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            return f"{name} is {shorten(tensor.dtype, quote=False)} {tensor.shape}, expected {dtypes[0]} {shape}"
    if facts.tokens > config.max_position_embeddings:
        return f"it has {facts.tokens:,} tokens, and the model's context {config.max_position_embeddings:,}"
    layer.offset, layer.start = facts.tokens, facts.start
    if layer.lost or (layer.window is None and facts.start) or facts.tokens - facts.start > slots:
        return f"its {slots:,} slots from position {facts.start:,} do not hold what {facts.tokens:,} tokens need"
    # The regime of a prompt that was longer before stays until the next one is read.
    if facts.long not in (model.model.is_long(facts.tokens), model.model.is_long(config.max_position_embeddings)):
        return f"its LongRoPE regime is not that of {facts.tokens:,} tokens"
    return None


def _parts(model: Model, bits: KVBits | None) -> list[tuple[int, tuple[str, ...]]]:
    """Of each of a layer's arrays: how many numbers a head has in a slot, and their types in safetensors' spelling."""
    width = model.config.head_dim
    if bits is None:
        return [(width, _FLOATS)] * 2
    groups = (width // bits.group_size, _FLOATS)
    return [part for each in (bits.keys, bits.values) for part in ((width * each // 32, ("U32",)), groups, groups)]


def _options(model: Model) -> dict[str, str]:
    """How the model was loaded: the settings that change what is read."""
    return {"longrope": model.model.longrope, "dtype": str(model.dtype).removeprefix("mlx.core.")}
