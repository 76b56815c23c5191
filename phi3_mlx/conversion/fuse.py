"""One model of a model and its adapter, and how much of the adapter is left in it.

In floats the changed weight is computed in float32 and rounded once. Packed again it may not survive: an adapter's
change is often smaller than half the step between two packed values, and rounding takes it away.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .. import sizes, values
from ..adapters.config import adapter_kind
from ..adapters.folder import (
    Adapters,
    Base,
    base_of,
    check_base,
    load_full,
    make_adapters,
    read_adapter,
    trained_on,
)
from ..adapters.lora import Adapter, float_weight
from ..adapters.stored import StoredLayers
from ..config import read_json
from ..engine import plan
from ..errors import AdapterError, OptionError
from ..models import read_config
from ..models.decoder import Model
from ..store import hub
from ..store.atomic import check_destination, new_directory
from ..store.checkpoint import DTYPES, outline, read_model
from ..store.finite import is_finite
from ..store.quantization import FLOATS, complete
from ..store.safetensors import Tensor
from .directory import DirectorySource
from .rounding import pack
from .sources import SPELLING, tensor_of, to_mlx
from .writer import check_space, write_json, write_weights

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

ENOUGH = 0.9  # of an adapter's effect; below it the fused model is no longer what was trained
_TOKENS = 512  # of text that the measurement reads
# Copies, float32, that are alive at once, as measured: of a changed matrix (with DoRA), of the text's logits.
_COPIES, _LOGITS = (3.3, 5.7), 6.6


@dataclass(frozen=True)
class Fused:
    """What `fuse` has made. `survived` is the share of the adapter's effect on the text's log-probabilities that the
    packed model has (1: all; 0: none; less: the noise is larger); None for a model in floats, which has it all."""

    path: Path
    packed: bool
    layers: int
    survived: float | None


def fuse(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    bits: int | None = None,
    text: str | None = None,
    force: bool = False,
) -> Fused:
    """Write `output`: the model with the adapter's changes in its weights.

    `model` is what the adapter was trained on, by default under the name that it was given then.
    A model in floats is written in `dtype` (its own by default). A packed one is packed again as it was, the changed
    layers in `bits` if given (5, 6 or 8 keep more of the adapter), or unpacked with `dequantize`. `text` is what the
    measurement reads, a bundled sample by default. A matrix is in memory at a time, and for the measurement the whole
    model; what the memory at hand cannot hold is refused before any of it is read. `force` replaces what is there, and
    refuses nothing for memory. Raises AdapterError, OptionError, MemoryLimitError and what `load` raises.
    """
    folder, output = Path(values.path(adapter, "adapter")).expanduser(), values.path(output, "output")
    dequantize, force = values.flag(dequantize, "dequantize"), values.flag(force, "force")
    bits, text = values.optional(values.whole, bits, "bits"), values.optional(values.text, text, "text")
    if dtype is not None:
        values.choice(dtype, "dtype", DTYPES)
    check_destination(Path(output), force=force)
    tensors, config = read_adapter(folder)
    if model is None:
        model, revision = trained_on(folder, config, revision)
    directory = hub.resolve(model, revision)
    source = _Source(directory, dequantize, dtype, bits)
    base = base_of(directory, model, revision)
    check_base(folder, config, base)
    shapes = outline(directory)
    if adapter_kind(folder, config) == "full":
        load_full(shapes, folder, tensors)
        source.replaced = tensors
    else:
        source.adapters = make_adapters(folder, tensors, config, shapes)
    planned = source.planned()
    measures = source.is_packed and bool(source.adapters)
    if text is not None and not measures:
        raise OptionError("text has no effect where nothing is packed, since nothing is measured; leave it out")
    if not force:
        _check_room(folder, directory, tensors, source, planned, measures)
    kept = _Effect(directory, base, folder, text) if measures else None
    gc.collect()
    mx.clear_cache()
    with new_directory(Path(output), force=force) as unfinished:
        check_space(Path(os.path.realpath(output)).parent, sum(tensor.nbytes for tensor in planned.values()))
        source.unpacked.write_extras(unfinished)  # first, for it may refuse
        write_weights(unfinished, planned, source.arrays(planned))
        write_json(unfinished / "config.json", source.config())
        survived = None if kept is None else kept.survived(read_model(unfinished))
    changed = len(source.adapters) or len(source.replaced)
    return Fused(Path(os.path.abspath(output)), source.is_packed, changed, survived)


def _check_room(
    folder: Path,
    directory: Path,
    tensors: Mapping[str, mx.array],
    source: _Source,
    planned: Mapping[str, Tensor],
    measures: bool,
) -> None:
    """MemoryLimitError if making the model, or measuring it, needs more memory than there is. Only headers are read."""
    from ..engine.plan import Workload

    held = {"the adapter": sum(array.nbytes for array in tensors.values())}
    written = {**held, "a matrix at a time": source.work(planned)}
    if not measures:
        plan.check_room(f"fusing {folder}", written, "free some")
        return
    run = Workload.of_directory(directory, _TOKENS)
    fused = sum(math.prod(one.shape) * run.itemsize if one.dtype in FLOATS else one.nbytes for one in planned.values())
    parts = {
        "weights": max(run.weights, fused),
        "work": max(run.workspace(run.length), int(_LOGITS * 4 * run.length * run.config.vocab_size)),
        "the adapter": 2 * held["the adapter"],  # what is written, and what is measured
    }
    least = sizes.size_text(sum(written.values()))
    plan.check_room(
        f"measuring what is left of {folder}",
        max(parts, written, key=lambda needs: sum(needs.values())),
        f"dequantize=True measures nothing and needs {least}",
    )


class _Source:
    """The tensors of the base, changed where the adapter changes them; at most one is in memory."""

    def __init__(self, directory: Path, dequantize: bool, dtype: str | None, bits: int | None):
        self.unpacked = DirectorySource(directory)  # for shapes; it checks the files, too
        self._raw = read_json(directory / "config.json")
        self._base = StoredLayers(directory)
        self.is_packed = self._base.quantization is not None and not dequantize
        if bits is not None and not self.is_packed:
            raise OptionError("bits is for packed models, and this one is written in floats; leave it out")
        if dtype is not None and self.is_packed:
            raise OptionError("dtype is for floats, and this model stays packed; give dequantize=True as well")
        own = self._raw.get("torch_dtype") or self._raw.get("dtype")
        self._dtype = dtype or (own if own in DTYPES else None)
        self._given_dtype = dtype
        self._bits = bits
        self.adapters: dict[str, Adapter] = {}
        self.replaced: dict[str, mx.array] = {}

    def planned(self) -> dict[str, Tensor]:
        """What will be written, in the order of the base's files."""
        result: dict[str, Tensor] = {}
        for name, tensor in self._base.tensors.items():
            path, _, leaf = name.rpartition(".")
            packed = self._base.packing(path)
            if packed is None or leaf not in ("weight", "scales", "biases"):
                spelled = SPELLING[self._given_dtype] if self._given_dtype and not self.is_packed else tensor.dtype
                result[name] = tensor_of(spelled, tensor.shape)
            elif leaf != "weight":
                continue
            elif not self.is_packed:
                result[name] = tensor_of(SPELLING[self._dtype or "bfloat16"], self.unpacked.tensors[name].shape)
            else:
                *rows, width = self.unpacked.tensors[name].shape
                result[name] = tensor_of("U32", (*rows, width * self._new_packing(path)["bits"] // 32))
                for part in ("scales", "biases"):
                    if f"{path}.{part}" in self._base.tensors:
                        result[f"{path}.{part}"] = self._base.tensors[f"{path}.{part}"]
        return result

    def arrays(self, planned: Mapping[str, Tensor]) -> Iterator[tuple[str, mx.array]]:
        parts: dict[str, mx.array] = {}
        for name, tensor in planned.items():
            path, _, leaf = name.rpartition(".")
            if name in parts:
                yield name, parts.pop(name)
            elif leaf != "weight" or (
                path not in self.adapters and (self.is_packed or self._base.packing(path) is None)
            ):
                array = self.replaced.get(name)
                yield name, _as_type(name, self._base.read(name) if array is None else array, to_mlx(tensor.dtype))
            else:
                layer = self._base.layer(path)
                adapter = self.adapters.get(path)
                weight = adapter.changed_weight(layer) if adapter else float_weight(layer)
                if not self.is_packed or self._base.packing(path) is None:
                    yield name, _as_type(name, weight, to_mlx(tensor.dtype))
                    continue
                # The scales' own type first: packing rounds to values that they can spell.
                scales = to_mlx(planned[f"{path}.scales"].dtype)
                weight = weight if scales == mx.uint8 else _as_type(name, weight, scales)
                new = pack(weight, self._new_packing(path))
                yield name, new[0]
                parts |= dict(zip((f"{path}.scales", f"{path}.biases"), new[1:], strict=False))

    def work(self, planned: Mapping[str, Tensor]) -> int:
        """Bytes that making the largest tensor takes: changed, or copied and perhaps cast."""
        made = [
            int(_COPIES[adapter.is_dora] * 4 * math.prod(self.unpacked.tensors[f"{path}.weight"].shape))
            for path, adapter in self.adapters.items()
        ]
        stored = self._base.tensors
        copied = [one.nbytes + (one != stored[name]) * stored[name].nbytes for name, one in planned.items()]
        return max(made + copied)

    def config(self) -> dict[str, Any]:
        config = {
            key: v for key, v in self._raw.items() if key not in ("quantization", "quantization_config", "auto_map")
        }
        if self.is_packed:
            recipe = dict(self._raw["quantization"])
            if self._bits is not None:
                recipe |= {path: self._new_packing(path) for path in self.adapters}
            config |= {"quantization": recipe, "quantization_config": recipe}
        elif self._dtype is not None:
            config["torch_dtype"] = self._dtype
            config.pop("dtype", None)
        return config

    def _new_packing(self, path: str) -> dict[str, Any]:
        packed = self._base.packing(path)
        assert packed is not None
        if self._bits is None or path not in self.adapters:
            return packed
        try:
            return complete(None, packed["group_size"], self._bits, packed["mode"])
        except ValueError as error:
            raise OptionError(f"bits {self._bits} cannot be honoured: {error}") from error


def _as_type(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """AdapterError if `dtype` cannot hold a value."""
    result = array.astype(dtype)
    if result.dtype == mx.float16 and array.dtype != mx.float16 and not is_finite(result):
        raise AdapterError(
            f"{name} has values beyond what float16 holds with the adapter in it; give dtype='bfloat16', with "
            "dequantize=True if the model is packed"
        )
    return result


class _Effect:
    """What the adapter does to the log-probabilities of a text, to find again in the fused model."""

    def __init__(self, directory: Path, base: Base, folder: Path, text: str | None):
        from ..text.tokenizer import read_tokenizer

        self._ids = _ids(read_tokenizer(directory), text, read_config(directory).max_position_embeddings)
        model = read_model(directory)
        adapters = Adapters(model, base)
        self._base = _log_probabilities(model, self._ids)
        adapters.load("adapter", folder)
        adapters.use("adapter")
        self._adapted = _log_probabilities(model, self._ids)

    def survived(self, fused: Model) -> float:
        """1 - |fused - adapted|^2 / |adapted - base|^2 over all log-probabilities."""
        effect = float(mx.sum(mx.square(self._adapted - self._base)))
        lost = float(mx.sum(mx.square(_log_probabilities(fused, self._ids) - self._adapted)))
        return 1.0 if effect == 0 else 1 - lost / effect


def _log_probabilities(model: Model, ids: mx.array) -> mx.array:
    """(L, vocab_size) float32."""
    logits = model(ids)[0].astype(mx.float32)
    result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def _ids(tokenizer: Tokenizer, text: str | None, context: int) -> mx.array:
    from . import texts

    ids = tokenizer.encode(texts.bundled("sample") if text is None else text)[: min(_TOKENS, context)]
    if not ids:
        raise OptionError("the text to measure with is empty; give some, or leave it out")
    return mx.array(ids)[None]
