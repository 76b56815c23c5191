"""`export_adapter`: a LoRA adapter as a GGUF file, for `llama-cli --lora` and ollama's ADAPTER.

llama.cpp computes s * B (A x) with s = alpha / rank, a rank for each tensor and one alpha for the file. It has Phi-3's
layers fused, as they are here, so that a matrix goes over as it is. Source: llama.cpp, src/llama-adapter.cpp and
convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import mlx.core as mx
import numpy as np

from .. import __version__, values
from ..adapters.config import adapter_kind
from ..adapters.folder import Base, base_of, check_base, make_adapters, read_adapter, trained_on
from ..adapters.lora import Adapter
from ..adapters.peft import adapters_of_peft, is_peft, read_peft
from ..adapters.stored import StoredLayers
from ..errors import AdapterError
from ..paths import expanded
from ..store import hub
from ..store.checkpoint import Checkpoint, open_checkpoint, outline
from ..text.tokenizer import read_tokenizer
from ..threads import refuse_fork
from .export import check_place
from .gguf.file import library
from .gguf.metadata import architecture
from .gguf.rounding import encoded_rows
from .gguf.sink import GgufEntry, GgufSink, nbytes_of
from .gguf.tensor_names import llama_cpp_name
from .modelfile import modelfile_text, write_modelfile

ADAPTER_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class ExportedAdapter:
    """What `export_adapter` has made: the file, how many layers it changes, and the Modelfile if it was asked for."""

    path: Path
    layers: int
    modelfile: Path | None


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    type: Literal["f32", "f16", "bf16"] = "f32",
    modelfile: bool = False,
    longrope: Literal["short", "long"] = "short",
    force: bool = False,
) -> ExportedAdapter:
    """Write `output`, a GGUF file, from a folder of `tune`, mlx-lm or PEFT (whose q, k and v may be apart).

    `model` is what the adapter was trained on, by default as it names it; PEFT's folders need it. `type` is that of
    the matrices. `modelfile` writes ollama's Modelfile beside it, for a base that lies there as NAME.gguf; `longrope`
    says whether its context keeps within the original length. `force` replaces a file that is there. Raises
    AdapterError for what llama.cpp's adapters have no place for (DoRA, whole weights), ConfigError for Phi-3-small,
    which it does not have; and OptionError, CheckpointError, OSError.
    """
    refuse_fork()
    folder, output = (expanded(values.path(given, name)) for name, given in (("adapter", adapter), ("output", output)))
    values.choice(type, "type", ADAPTER_TYPES)
    modelfile, force = values.flag(modelfile, "modelfile"), values.flag(force, "force")
    check_place(output, force, modelfile=modelfile)
    gguf = library(output)
    base, checkpoint, adapters = _opened(folder, model, revision)
    kind = architecture(checkpoint.config, base.name)
    tokenizer = read_tokenizer(checkpoint.directory) if modelfile else None
    base_file = Path(f"{Path(base.name).name}.gguf")
    if tokenizer is not None:
        modelfile_text(output, tokenizer, checkpoint.config, base=base_file, longrope=longrope)  # may refuse
    arrays, alpha = adapter_arrays(folder, adapters)
    entries = [
        GgufEntry(name, array.shape, type.upper(), nbytes_of(gguf, array.shape, type.upper()), name)
        for name, array in arrays.items()
    ]

    def encode(entry: GgufEntry) -> Iterator[np.ndarray]:
        yield encoded_rows(gguf, arrays[entry.name], entry.kind, entry.name)

    GgufSink(gguf, output).write(kind, _metadata(folder, base, alpha), entries, encode)
    written = None
    if tokenizer is not None:
        written = write_modelfile(output.absolute(), tokenizer, checkpoint.config, base=base_file, longrope=longrope)
    return ExportedAdapter(output.absolute(), len(adapters), written)


def adapter_arrays(folder: Path, adapters: Mapping[str, Adapter]) -> tuple[dict[str, mx.array], float]:
    """(float32 arrays by llama.cpp's names, alpha), of adapters by layer path, which have one scale.

    `lora_a` is (rank, inputs), `lora_b` (outputs, rank). Where ranks differ, llama.cpp's alpha / rank would as well;
    B makes up for it. Raises AdapterError.
    """
    rank = max(adapter.lora_a.shape[1] for adapter in adapters.values())
    scale = next(iter(adapters.values())).scale
    if not scale:
        _refuse(folder, "its scale is 0, so that it changes nothing, and llama.cpp takes an alpha of 0 for none")
    arrays = {}
    for path, adapter in adapters.items():
        name = llama_cpp_name(f"{path}.weight")
        arrays[f"{name}.lora_a"] = adapter.lora_a.T
        arrays[f"{name}.lora_b"] = (adapter.separated() * (adapter.lora_a.shape[1] / rank)).T
    return arrays, scale * rank


def _metadata(folder: Path, base: Base, alpha: float) -> dict[str, Any]:
    about: dict[str, Any] = {
        "general.type": "adapter",
        "general.name": folder.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        "general.base_model.count": 1,
        "general.base_model.0.name": Path(base.name).name,
        "phi3_mlx.version": __version__,
        "phi3_mlx.base_fingerprint": base.fingerprint,
    }
    if hub.is_repository(base.name):
        about["general.base_model.0.repo_url"] = f"https://huggingface.co/{base.name}"
    return about


def _opened(folder: Path, model: str | None, revision: str | None) -> tuple[Base, Checkpoint, Mapping[str, Adapter]]:
    """The base, its checkpoint, and the adapters by layer path. Raises AdapterError."""
    if is_peft(folder):
        try:
            return _opened_peft(folder, model, revision)
        except AdapterError as error:
            way_out = "merge it where it was trained (merge_and_unload) and export that model"
            raise AdapterError(f"{error}; or {way_out}") from error
    tensors, raw = read_adapter(folder)
    kind = adapter_kind(folder, raw)
    if kind == "full":
        _refuse(folder, "it holds whole weights (full fine-tuning)")
    if kind == "dora":
        _refuse(folder, "it is a DoRA adapter, and llama.cpp has no place for magnitudes")
    if model is None:
        model, revision = trained_on(folder, raw, revision)
    checkpoint = open_checkpoint(hub.resolve(model, revision))
    base = base_of(checkpoint, model, revision)
    check_base(folder, raw, base)
    return base, checkpoint, make_adapters(folder, tensors, raw, outline(checkpoint))


def _opened_peft(
    folder: Path, model: str | None, revision: str | None
) -> tuple[Base, Checkpoint, Mapping[str, Adapter]]:
    settings, arrays = read_peft(folder)
    if settings.dora:
        raise AdapterError(f"{folder} cannot be exported: use_dora is true, and llama.cpp has no place for magnitudes")
    if model is None:
        raise AdapterError(f"{folder} is PEFT's; give the model that it was trained on with model=NAME")
    checkpoint = open_checkpoint(hub.resolve(model, revision))
    adapters = adapters_of_peft(folder, settings, arrays, outline(checkpoint), StoredLayers(checkpoint))
    return base_of(checkpoint, model, revision), checkpoint, adapters


def _refuse(folder: Path, why: str) -> NoReturn:
    way_out = "merge it into its model on the way: phi3-mlx export without --adapter-only"
    raise AdapterError(f"{folder} cannot be exported alone: {why}; {way_out}")
