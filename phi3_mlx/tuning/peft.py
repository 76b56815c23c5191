"""Adapters to and from PEFT, Hugging Face's library (its LoRA: A (rank, inputs), B (outputs, rank), DoRA's magnitudes).

PEFT adapters may change the fused layers of Phi-3 as transformers has them, or q, k, v, gate and up apart, as models
with split projections have them. Split ones are joined exactly: their components stand side by side, each changing its
own rows alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from .. import hub, values
from ..atomic import check_destination, new_directory
from ..checkpoint import load_model
from ..config import Config
from ..errors import AdapterError
from ..fields import Fields, shorten
from ..models.decoder import Model
from .adapters import (
    CONFIG,
    STRONGEST,
    adapter_files,
    base_of,
    check_base,
    checked_config,
    make_adapters,
    read_adapter,
    read_floats,
    trained_on,
    write_adapter,
    write_pair,
)
from .lora import Adapter, get_layer, row_lengths, scale_of
from .targets import fused, part_rows, shape

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>model\.layers\.\d+)\.(?P<home>\w+)\.(?P<name>\w+)\."
    r"(?P<leaf>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)
_REPEATED = 3  # parts of a pattern that may be repeated
# Settings of PEFT that change the numbers in ways that a LoRA or DoRA layer here does not have.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
}


def import_peft(source: str | Path, output: str | Path, model: str, *, revision: str | None = None) -> int:
    """Make an adapter folder of a PEFT one, for `model`; returns how many layers it changes.

    Raises AdapterError for settings that cannot be honoured and tensors that do not fit the model.
    """
    source, output = (
        Path(values.path(given, name)).expanduser() for name, given in (("source", source), ("output", output))
    )
    check_destination(output, fault=AdapterError)
    raw, tensors = _read(source)
    directory = hub.resolve(model, revision)
    loaded = load_model(directory)
    adapters = adapters_of_peft(source, raw, tensors, loaded)
    given = Fields(raw, source / _CONFIG, AdapterError)
    alpha, rank, rslora = _alpha(given, "lora_alpha"), given.whole("r", 8), given.flag("use_rslora", False)
    facts = {"phi3_mlx": {"alpha": alpha, "rank": rank, "rslora": rslora, "imported": "peft"}}
    base = base_of(directory, model, revision)
    files = adapter_files(adapters, loaded.config.num_hidden_layers, base, **facts, model=base.name)
    with new_directory(output, fault=AdapterError) as folder:
        write_adapter(folder, *files)
    return len(adapters)


def adapters_of_peft(
    source: Path, raw: Mapping[str, Any], tensors: Mapping[str, mx.array], model: Model
) -> dict[str, Adapter]:
    """The adapters, by layer path, of a PEFT folder's config and tensors."""
    found: dict[str, dict[str, dict[str, mx.array]]] = {}  # layer path -> part -> leaf
    for name, array in tensors.items():
        match = _KEY.fullmatch(name)
        path = None if match is None else fused(model.config, match["name"])
        if match is None or path is None or path.rpartition(".")[0] != match["home"]:
            _refuse(source, f"it has {name}, which is no LoRA or DoRA tensor of a Phi-3 layer")
        found.setdefault(f"{match['layer']}.{path}", {}).setdefault(match["name"], {})[match["leaf"]] = array
    if not found:
        _refuse(source, f"{_WEIGHTS} is empty")
    scales = {
        (path, part): _scale(Fields(raw, source / _CONFIG, AdapterError), f"{path.rpartition('.')[0]}.{part}")
        for path, parts in found.items()
        for part in parts
    }
    common = next(iter(scales.values()))  # one for all, as mlx-lm has it; B takes the difference
    adapters = {}
    order = list(model.config.adaptable)
    for path in sorted(found, key=lambda path: (int(path.split(".")[2]), order.index(path.split(".", 3)[3]))):
        adapters[path] = _joined(
            source, path, found[path], {part: scales[path, part] for part in found[path]}, common, model
        )
    mx.eval([adapter.parameters() for adapter in adapters.values()])
    return adapters


def _joined(
    source: Path,
    path: str,
    parts: Mapping[str, Mapping[str, mx.array]],
    scales: Mapping[str, float],
    common: float,
    model: Model,
) -> Adapter:
    """One adapter of a layer of the parts that PEFT has; its rank is the sum of theirs."""
    name = path.rpartition(".")[2]
    try:
        linear = get_layer(model, path)
    except (IndexError, KeyError, AttributeError):
        _refuse(source, f"it changes {path}, which this model does not have")
    spans = part_rows(model.config, name)
    rows = max(end for _, end in spans.values())
    if name in parts:
        if len(parts) > 1:
            _refuse(source, f"it changes {path} both whole and in parts")
        spans = {name: (0, rows)}
    a, b, m = [], [], None
    for part, leaves in parts.items():
        first, end = spans[part]
        part_a, part_b = leaves.get("lora_A"), leaves.get("lora_B")
        if part_a is None or part_b is None:
            _refuse(source, f"{path}: {part} has no {'lora_A' if part_a is None else 'lora_B'}")
        if part_b.shape != (end - first, part_a.shape[0]):
            _refuse(source, f"{path}: lora_B of {part} is {part_b.shape}, and the layer has {end - first} rows there")
        a.append(part_a.astype(mx.float32).T)
        b.append(mx.pad(part_b.astype(mx.float32).T * (scales[part] / common), [(0, 0), (first, rows - end)]))
        if "lora_magnitude_vector" in leaves:
            # Rows that no part changes keep their length.
            m = row_lengths(linear) if m is None else m
            m[first:end] = leaves["lora_magnitude_vector"].astype(mx.float32).reshape(-1)
    widths, width = {array.shape[0] for array in a}, shape(model.config, name)[1]
    if widths != {width}:
        _refuse(source, f"{path}: lora_A reads {sorted(widths)} inputs, and the layer has {width}")
    return Adapter(mx.concatenate(a, axis=1), mx.concatenate(b, axis=0), common, m=m)


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
    source, output = (
        Path(values.path(given, name)).expanduser() for name, given in (("source", source), ("output", output))
    )
    check_destination(output, fault=AdapterError)
    tensors, config = read_adapter(source)
    if config.get("fine_tune_type") == "full":
        raise AdapterError(f"{source} holds whole weights, which PEFT has no place for; fuse it and share the model")
    if model is None:
        model, revision = trained_on(source, config, revision)
    directory = hub.resolve(model, revision)
    check_base(source, config, base_of(directory, model, revision))
    loaded = load_model(directory)
    adapters = make_adapters(source, tensors, config, loaded)
    arrays, ranks = peft_tensors(adapters, loaded.config, split)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    given = Fields(config, source / CONFIG, AdapterError)
    rslora = given.fields("phi3_mlx").flag("rslora", False)
    dropout = given.fields("lora_parameters").number("dropout", 0.0, least=0.0, most=1.0)
    scale = next(iter(adapters.values())).scale
    alpha = {path: scale * (math.sqrt(rank) if rslora else rank) for path, rank in ranks.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": revision,
        "inference_mode": True,
        "bias": "none",
        "r": common,
        "lora_alpha": scale * (math.sqrt(common) if rslora else common),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": any(adapter.is_dora for adapter in adapters.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": {_exactly(path): rank for path, rank in ranks.items() if rank != common},
        "alpha_pattern": {_exactly(path): alpha[path] for path, rank in ranks.items() if rank != common},
    }
    with new_directory(output, fault=AdapterError) as folder:
        write_pair(folder, _CONFIG, settings, _WEIGHTS, arrays, "pt")
    return len(adapters)


def peft_tensors(
    adapters: Mapping[str, Adapter], config: Config, split: bool
) -> tuple[dict[str, mx.array], dict[str, int]]:
    """(tensors by PEFT's names, rank of every layer it changes). Components that change nothing are left out."""
    arrays: dict[str, mx.array] = {}
    ranks = {}
    for path, adapter in adapters.items():
        home, _, name = path.rpartition(".")
        spans = part_rows(config, name) if split else {name: (0, adapter.lora_b.shape[1])}
        for part, (first, end) in spans.items():
            b = adapter.lora_b[:, first:end]
            used = mx.any(b != 0, axis=1) & mx.any(adapter.lora_a != 0, axis=0)
            kept = [i for i, one in enumerate(used.tolist()) if one] or [0]  # type: ignore[arg-type]
            if not any(used.tolist()) and not adapter.is_dora and len(spans) > 1:  # type: ignore[arg-type]
                continue  # a part that was not adapted
            stem = f"base_model.model.{home}.{part}"
            arrays[f"{stem}.lora_A.weight"] = mx.contiguous(adapter.lora_a[:, mx.array(kept)].T)
            arrays[f"{stem}.lora_B.weight"] = mx.contiguous(b[mx.array(kept)].T)
            if adapter.is_dora:
                arrays[f"{stem}.lora_magnitude_vector"] = mx.contiguous(adapter.m[first:end])
            ranks[f"{home}.{part}"] = len(kept)
    return arrays, ranks


def _read(source: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    pickle = (source / "adapter_model.bin").is_file()
    hint = " (adapter_model.bin is pickle, which is never read)" if pickle else ""
    raw = checked_config(source, _CONFIG, _WEIGHTS, f"{hint}; name a folder that PEFT's save_pretrained has written")
    for key, allowed in _MUST_BE.items():
        if raw.get(key, allowed[0]) not in allowed:
            _refuse(source, f"{key} is {shorten(raw[key])}, which a LoRA or DoRA layer here does not have")
    return raw, read_floats(source / _WEIGHTS)


def _scale(given: Fields, path: str) -> float:
    """What PEFT multiplies B A by in the layer `path`: of its own pattern if one matches, as PEFT matches them."""
    ranks, alphas = given.fields("rank_pattern"), given.fields("alpha_pattern")
    own_rank = next((key for key in ranks.raw if _matches(ranks, key, path)), None)
    own_alpha = next((key for key in alphas.raw if _matches(alphas, key, path)), None)
    rank = given.whole("r", 8, least=1) if own_rank is None else ranks.whole(own_rank, least=1)
    alpha = _alpha(given, "lora_alpha") if own_alpha is None else _alpha(alphas, own_alpha)
    return scale_of(alpha, rank, given.flag("use_rslora", False))


def _alpha(given: Fields, key: str) -> float:
    return given.number(key, 8, least=1e-6, most=STRONGEST)


def _matches(table: Fields, pattern: str, path: str) -> bool:
    """Whether PEFT applies the entry `pattern`, a regular expression, to the layer `path`."""
    # Matching takes for ever where a group is repeated that may match in several ways, or much is repeated.
    if len(re.findall(r"[*+{]", pattern)) > _REPEATED or re.search(r"\)[*+{]", pattern):
        table.fail(pattern, "the name of a layer, or a pattern that repeats little")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except (re.error, OverflowError):
        table.fail(pattern, "the name of a layer, or a regular expression that matches it")


def _exactly(path: str) -> str:
    """A pattern of PEFT that matches this layer alone."""
    return f"^{re.escape(path)}"


def _refuse(source: Path, why: str) -> NoReturn:
    raise AdapterError(f"{source} cannot be imported: {why}")
