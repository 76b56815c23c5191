"""Training on from an adapter (`from_adapter`): what of a run it decides, and its arrays on the model.

An adapter has a kind, a rank, a strength and layers, and its arrays mean something with these alone. So they are not
to be chosen again: a run has the adapter's, and one that names others is refused. Optimizer, schedule and data start
fresh; dropout stays as it was unless another is given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..adapters.config import CONFIG, adapter_kind, is_rslora, scale_in
from ..adapters.folder import WEIGHTS, Base, check_base, load_full, make_adapters, read_adapter, read_config_of
from ..adapters.lora import AdaptedLinear, Adapter, scale_of
from ..adapters.targets import find_targets
from ..config import Config
from ..errors import AdapterError, OptionError
from ..fields import Fields
from ..models.decoder import Model
from ..models.hooks import get_layer, set_layer
from ..store.safetensors import read_header


@dataclass(frozen=True)
class Start:
    """The adapter that a run begins with: how many numbers it trains, and a hash of them."""

    numbers: int
    fingerprint: str


def decided_by(directory: Path) -> dict[str, Any]:
    """The settings that an adapter decides: method, rank, alpha, rslora and dropout. Raises AdapterError."""
    config = read_config_of(directory)
    method = adapter_kind(directory, config)
    if method == "full":
        return {"method": method}
    fields, scale = Fields(config, directory / CONFIG, AdapterError), scale_in(directory, config)
    parameters, ours = fields.fields("lora_parameters"), fields.fields("phi3_mlx")
    # mlx-lm writes rank and scale. How they came about is ours: parts of fused layers add their ranks up.
    rank, alpha = ours.whole("rank", 0), ours.number("alpha", 0.0)
    rslora = is_rslora(directory, config)
    if not rank or not math.isclose(scale_of(alpha, rank, rslora), scale, rel_tol=1e-6):
        rank = parameters.whole("rank", least=1)
        alpha, rslora = scale * rank, False
    dropout = min(parameters.number("dropout", 0.0, least=0), 0.99)
    return {"method": method, "rank": rank, "alpha": alpha, "rslora": rslora, "dropout": dropout}


def read_start(
    directory: Path, config: Config, base: Base, *, targets: Sequence[str] = (), layers: str | None = None
) -> Start:
    """The adapter of a folder; only headers are read, and the file's bytes. `targets` and `layers` are the settings.

    Raises AdapterError if it was trained on another model than `base`, OptionError if it changes other layers than
    `targets` and `layers` name.
    """
    check_base(directory, read_config_of(directory), base)
    tensors = read_header(directory / WEIGHTS)
    changed = {name.rpartition(".")[0] for name in tensors}
    for name, given in (("targets", targets), ("layers", layers)):
        if given:
            wanted = {target.path for target in find_targets(config, targets, layers)}
            if wanted != changed:
                raise OptionError(f"{name} {given} are not the layers that {directory} changes; leave it out")
    digest = hashlib.sha256()
    with (directory / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Start(sum(math.prod(tensor.shape) for tensor in tensors.values()), digest.hexdigest()[:32])


def attach_start(model: Model, directory: Path, dropout: float) -> dict[str, Adapter]:
    """Put the adapter of a folder on the model, to be trained, and freeze all else; returns its layers by their paths.

    Whole weights (of full fine-tuning) take the place of the model's, and none is frozen.
    """
    tensors, config = read_adapter(directory)
    if adapter_kind(directory, config) == "full":
        load_full(model, directory, tensors)
        model.unfreeze()
        return {}
    adapters = {}
    stored = make_adapters(directory, tensors, config, model)
    model.freeze()
    for path, read in stored.items():
        linear = get_layer(model, path)
        parts = model.config.parts.get(path.rpartition(".")[2], {})
        adapters[path] = Adapter(
            read.lora_a,
            read.lora_b,
            read.scale,
            m=read.m if read.is_dora else None,
            dropout=dropout,
            mask=kept_apart(np.array(read.lora_b), parts),
        )
        set_layer(model, path, AdaptedLinear(linear, {"default": adapters[path]}))
    mx.eval(model.trainable_parameters())
    return adapters


def kept_apart(lora_b: np.ndarray, parts: Mapping[str, tuple[int, int]]) -> mx.array | None:
    """The mask of an `Adapter` (rank, rows) whose components change one part of a fused layer each; else None.

    The file does not say so, but zeros do: a component that is trained on the whole layer leaves no part untouched. One
    that changes nothing yet belongs to the part of the component before it.
    """
    owner, first_owned = None, None
    owners = []
    for row in lora_b:
        touched = [span for span in parts.values() if row[span[0] : span[1]].any()]
        if len(touched) > 1:
            return None
        owner = touched[0] if touched else owner
        first_owned = first_owned or owner
        owners.append(owner)
    if first_owned is None or len(parts) < 2:
        return None
    mask = np.zeros(lora_b.shape, np.float32)
    for row, span in zip(mask, owners, strict=True):
        first, last = span or first_owned
        row[first:last] = 1
    return mx.array(mask)
