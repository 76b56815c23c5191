"""Adapters to and from PEFT, Hugging Face's library (its LoRA: A (rank, inputs), B (outputs, rank), DoRA's magnitudes).

PEFT adapters may change Phi-3's fused layers, or q, k, v, gate and up apart, as in models with split projections. Split
ones are joined exactly: their components stand side by side, and each changes its own rows alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import values
from ..config import Config
from ..errors import AdapterError
from ..fields import Fields, shorten
from ..models.decoder import Model
from ..models.hooks import get_layer
from ..paths import expanded
from ..store import hub
from ..store.atomic import check_destination, new_directory
from ..store.checkpoint import open_checkpoint, outline
from .config import CONFIG, adapter_kind, is_rslora
from .folder import (
    WEIGHTS,
    adapter_files,
    base_of,
    check_base,
    checked_config,
    layer_shape,
    make_adapters,
    read_adapter,
    read_floats,
    trained_on,
    write_adapter,
    write_pair,
)
from .lora import Adapter, float_weight, row_lengths
from .peft_config import PeftConfig, alpha_of, exactly, refuse
from .principal import taken_out
from .stored import StoredLayers
from .targets import path_of

_PEFT_WEIGHTS = "adapter_model.safetensors"
_NAME_PREFIX = "base_model.model."
_LEAVES = ("lora_A", "lora_B", "lora_magnitude_vector")
_TENSOR_NAME = re.compile(
    rf"{re.escape(_NAME_PREFIX)}(?P<path>(?P<layer>model\.layers\.\d+)\.(?P<home>\w+)\.(?P<name>\w+)|lm_head)\."
    rf"(?P<leaf>{'|'.join(_LEAVES)})(?:\.weight)?"
)
# PEFT saves the weights of embedding and output layer too where an adapter changes one of them.
_SAVED_WEIGHT = re.compile(rf"{re.escape(_NAME_PREFIX)}(?P<path>model\.embed_tokens|lm_head)\.(?:base_layer\.)?weight")


def import_peft(source: str | Path, output: str | Path, model: str, *, revision: str | None = None) -> int:
    """Make an adapter folder of a PEFT one, for `model`; returns how many layers it changes.

    Raises AdapterError for settings that cannot be honoured and tensors that do not fit the model.
    """
    source, output = (expanded(values.path(given, name)) for name, given in (("source", source), ("output", output)))
    check_destination(output, fault=AdapterError)
    config, tensors = read_peft(source)
    checkpoint = open_checkpoint(hub.resolve(model, revision))
    shapes = outline(checkpoint)
    adapters = adapters_of_peft(source, config, tensors, shapes, StoredLayers(checkpoint))
    facts = {
        "phi3_mlx": {"alpha": config.alpha, "rank": config.rank, "rslora": config.rslora, "imported": "peft"},
    }
    base = base_of(checkpoint, model, revision)
    files = adapter_files(adapters, shapes.config.num_hidden_layers, base, **facts, model=base.name)
    with new_directory(output, fault=AdapterError) as folder:
        write_adapter(folder, *files)
    return len(adapters)


def adapters_of_peft(
    source: Path, config: PeftConfig, tensors: Mapping[str, mx.array], model: Model, base: StoredLayers
) -> dict[str, Adapter]:
    """The adapters, by layer path, of a PEFT folder's config and tensors. Raises AdapterError.

    `model` may be an outline: weights are read from `base` alone.
    """
    layers: dict[str, dict[str, dict[str, mx.array]]] = {}  # layer path -> part -> leaf
    for name, array in tensors.items():
        saved = _SAVED_WEIGHT.fullmatch(name)
        if saved is not None:
            _check_saved(source, name, array, model, base, saved["path"])
            continue
        path, part, leaf = _place(source, name, model.config)
        layers.setdefault(path, {}).setdefault(part, {})[leaf] = array
    if not layers:
        refuse(source, f"{_PEFT_WEIGHTS} is empty")
    if config.principal and model.config.quantization is not None:
        refuse(
            source,
            f"init_lora_weights is {config.principal!r}, which takes a part out of the base, and this one is rounded; "
            "import it for the model in floats that it was trained on, and fuse and convert that",
        )
    scales = (config.scale_of(_sibling(path, part)) for path, parts in layers.items() for part in parts)
    common = next(iter(scales))  # mlx-lm has one scale for all layers; B is multiplied by what differs
    order = list(model.config.adaptable)

    def place_in_model(path: str) -> tuple[float, int]:
        if not path.startswith("model.layers."):
            return math.inf, 0
        _, _, number, name = path.split(".", 3)
        return int(number), order.index(name)

    adapters = {}
    for path in sorted(layers, key=place_in_model):
        adapters[path] = adapter = _joined(source, path, layers[path], config, common, model, base)
        mx.eval(adapter.parameters())  # lazy ones would keep the base's weights in memory
        if not adapter.largest <= mx.finfo(mx.float32).max:
            refuse(source, f"{path} has numbers beyond what float32 holds once alpha is in them")
    return adapters


def _place(source: Path, name: str, config: Config) -> tuple[str, str, str]:
    """(layer path in the model, part of that layer, leaf) from a tensor's name. Raises AdapterError."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        of_embedding = "; adapters of the embedding are not supported" if "embed" in name else ""
        refuse(
            source,
            f"it has {shorten(name, quote=False)}, which is no LoRA or DoRA tensor of a linear layer{of_embedding}",
        )
    if match["layer"] is None:
        return match["path"], match["path"], match["leaf"]
    place = path_of(config, match["name"])
    if place is None or place.rpartition(".")[0] != match["home"]:
        refuse(
            source,
            f"it has {shorten(name, quote=False)}, which is of no linear layer of {config.model_type} that adapts",
        )
    return f"{match['layer']}.{place}", match["name"], match["leaf"]


def _sibling(path: str, name: str) -> str:
    """The path of the layer `name` in the module that the layer `path` is in."""
    home, dot, _ = path.rpartition(".")
    return f"{home}{dot}{name}"


def _check_saved(source: Path, name: str, array: mx.array, model: Model, base: StoredLayers, path: str) -> None:
    """AdapterError unless weights that were saved beside an adapter equal the base's."""
    tied = path == "lm_head" and model.config.tie_word_embeddings
    weight = float_weight(base.layer("model.embed_tokens" if tied else path)).astype(array.dtype)
    if weight.shape != array.shape or not mx.array_equal(weight, array):
        refuse(
            source,
            f"it has {shorten(name, quote=False)}, which differs from the base's, and an adapter has no place for "
            "whole weights",
        )


def _joined(
    source: Path,
    path: str,
    parts: Mapping[str, Mapping[str, mx.array]],
    config: PeftConfig,
    common: float,
    model: Model,
    base: StoredLayers,
) -> Adapter:
    """The adapter of a layer from PEFT's adapters of its parts; its rank is the sum of theirs. Raises AdapterError."""
    name = path.rpartition(".")[2]
    try:
        linear = get_layer(model, path)
    except (IndexError, KeyError, AttributeError):
        tied = ": its output layer is its embedding" if path == "lm_head" else ""
        refuse(source, f"it changes {path}, which this model does not have{tied}")
    rows, width = layer_shape(linear)
    spans = model.config.parts.get(name) or {name: (0, rows)}
    if name in parts:
        if len(parts) > 1:
            refuse(source, f"it changes {path} both whole and in parts")
        spans = {name: (0, rows)}
    a, b, m = [], [], None
    for part, leaves in parts.items():
        first, end = spans[part]
        rank, scale = config.rank_of(_sibling(path, part)), config.scale_of(_sibling(path, part))
        part_a, part_b = _checked_factors(source, path, part, leaves, config, (end - first, width), rank)
        components = [(part_a, part_b * (scale / common))]
        if config.principal:
            taken_b, taken_a = taken_out(
                config.principal, np.array(float_weight(base.layer(path))[first:end]), rank, scale
            )
            components.append((mx.array(taken_a.astype(np.float32)), mx.array((-taken_b / common).astype(np.float32))))
        for factor_a, factor_b in components:
            a.append(factor_a.T)
            b.append(mx.pad(factor_b.T, [(0, 0), (first, rows - end)]))
        if config.dora:
            # Rows that no part changes keep their length.
            m = row_lengths(base.layer(path)) if m is None else m
            m[first:end] = leaves["lora_magnitude_vector"].astype(mx.float32).reshape(-1)
    return Adapter(mx.concatenate(a, axis=1), mx.concatenate(b, axis=0), common, m=m)


def _checked_factors(
    source: Path,
    path: str,
    part: str,
    leaves: Mapping[str, mx.array],
    config: PeftConfig,
    shape: tuple[int, int],
    rank: int,
) -> tuple[mx.array, mx.array]:
    """A (rank, inputs) and B (outputs, rank) in float32 of a part whose `shape` is (outputs, inputs). AdapterError."""
    for leaf in _LEAVES if config.dora else _LEAVES[:2]:
        if leaf not in leaves:
            refuse(source, f"{path}: {part} has no {leaf}")
    if "lora_magnitude_vector" in leaves and not config.dora:
        refuse(source, f"{path}: {part} has a lora_magnitude_vector, and use_dora is false")
    rows, width = shape
    a, b = leaves["lora_A"].astype(mx.float32), leaves["lora_B"].astype(mx.float32)
    if a.shape[1:] != (width,):
        refuse(source, f"{path}: lora_A of {part} is {a.shape}, and the layer reads {width} inputs")
    if b.shape != (rows, a.shape[0]):
        refuse(source, f"{path}: lora_B of {part} is {b.shape}, and the layer has {rows} rows there")
    if a.shape[0] != min(rank, *(b.shape[:1] if config.principal else (rank,))):
        refuse(source, f"{path}: {part} has {a.shape[0]} components, and {CONFIG} says {rank}")
    return a, b


def export_peft(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    split: bool = False,
) -> int:
    """Make a PEFT folder of an adapter folder; returns how many layers it changes.

    `split` makes q, k, v, gate and up of the fused layers, for models that have them apart. `model` is the base, by
    default the one that the adapter names. Raises AdapterError.
    """
    source, output = (expanded(values.path(given, name)) for name, given in (("source", source), ("output", output)))
    split = values.flag(split, "split")
    check_destination(output, fault=AdapterError)
    tensors, config = read_adapter(source)
    if adapter_kind(source, config) == "full":
        raise AdapterError(f"{source} holds whole weights, which PEFT has no place for; fuse it and share the model")
    if model is None:
        model, revision = trained_on(source, config, revision)
    checkpoint = open_checkpoint(hub.resolve(model, revision))
    base = base_of(checkpoint, model, revision)
    check_base(source, config, base)
    shapes = outline(checkpoint)
    adapters = make_adapters(source, tensors, config, shapes)
    arrays, ranks = peft_tensors(adapters, shapes.config, split)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    given = Fields(config, source / CONFIG, AdapterError)
    rslora = is_rslora(source, config)
    dropout = given.fields("lora_parameters").number("dropout", 0.0, least=0.0, most=1.0)
    scale = next(iter(adapters.values())).scale
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name if "/" in base.name else str(checkpoint.directory),
        "revision": base.revision,
        "inference_mode": True,
        "bias": "none",
        "r": common,
        "lora_alpha": alpha_of(scale, common, rslora),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": any(adapter.is_dora for adapter in adapters.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": {exactly(path): rank for path, rank in ranks.items() if rank != common},
        "alpha_pattern": {
            exactly(path): alpha_of(scale, rank, rslora) for path, rank in ranks.items() if rank != common
        },
    }
    with new_directory(output, fault=AdapterError) as folder:
        write_pair(folder, CONFIG, settings, _PEFT_WEIGHTS, arrays, "pt")
    return len(adapters)


def peft_tensors(
    adapters: Mapping[str, Adapter], config: Config, split: bool
) -> tuple[dict[str, mx.array], dict[str, int]]:
    """(tensors by PEFT's names, rank of every layer that changes). Components that are all zero are left out."""
    arrays: dict[str, mx.array] = {}
    ranks = {}
    for path, adapter in adapters.items():
        name, whole = path.rpartition(".")[2], (0, adapter.lora_b.shape[1])
        spans = config.parts.get(name, {name: whole}) if split else {name: whole}
        for part, (first, end) in spans.items():
            b = adapter.lora_b[:, first:end]
            used = mx.any(b != 0, axis=1) & mx.any(adapter.lora_a != 0, axis=0)
            kept = [i for i, is_used in enumerate(used.tolist()) if is_used] or [0]  # type: ignore[arg-type]
            if not any(used.tolist()) and not adapter.is_dora and len(spans) > 1:  # type: ignore[arg-type]
                continue  # a part that was not adapted
            stem = f"{_NAME_PREFIX}{_sibling(path, part)}"
            arrays[f"{stem}.lora_A.weight"] = mx.contiguous(adapter.lora_a[:, mx.array(kept)].T)
            arrays[f"{stem}.lora_B.weight"] = mx.contiguous(b[mx.array(kept)].T)
            if adapter.is_dora:
                arrays[f"{stem}.lora_magnitude_vector"] = mx.contiguous(adapter.m[first:end])
            ranks[_sibling(path, part)] = len(kept)
    return arrays, ranks


def is_peft(directory: Path) -> bool:
    """Whether a folder holds what PEFT has saved, and no adapter that needs no import."""
    return (directory / _PEFT_WEIGHTS).is_file() and not (directory / WEIGHTS).is_file()


def read_peft(source: Path) -> tuple[PeftConfig, dict[str, mx.array]]:
    """The settings and the tensors of a PEFT folder. Raises AdapterError."""
    hint = ""
    if (source / "adapter_model.bin").is_file():
        hint = " (adapter_model.bin is pickle, which is never read)"
    elif (source / WEIGHTS).is_file():
        hint = f" ({WEIGHTS} is of an adapter that can be used as it is)"
    raw = checked_config(
        source, CONFIG, _PEFT_WEIGHTS, f"{hint}; name a folder that PEFT's save_pretrained has written"
    )
    config = PeftConfig.of(raw, source)
    return config, read_floats(source / _PEFT_WEIGHTS)
