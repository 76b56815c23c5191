"""Adapter folders, in mlx-lm's format both ways, and adapters on a model: loaded, weighted, switched.

A folder holds `adapters.safetensors` (`<layer>.lora_a`, `.lora_b` and for DoRA `.m`; for full fine-tuning the whole
weights) and `adapter_config.json`: mlx-lm's `fine_tune_type`, `num_layers` and `lora_parameters`, and beside them
`base_model`, which says what the adapter was trained on.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import values
from ..config import read_json
from ..errors import AdapterError, CheckpointError, OptionError
from ..fields import shorten
from ..files import json_text
from ..models.decoder import Model
from ..models.hooks import get_layer, set_layer
from ..paths import expanded, instead_of_adapter
from ..store import hub
from ..store.atomic import named, new_files
from ..store.checkpoint import Checkpoint, open_checkpoint, read_arrays
from ..store.finite import is_finite
from ..store.safetensors import Weights, read_header
from .config import CONFIG, adapter_kind, check_config, scale_in
from .lora import AdaptedLinear, Adapter

WEIGHTS = "adapters.safetensors"
_SAMPLE = 4096  # bytes that a fingerprint reads at the beginning, middle and end of each tensor


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on: its name, its revision, and a fingerprint of its weights."""

    name: str
    revision: str | None
    fingerprint: str


def base_of(source: Path | Checkpoint, name: str, revision: str | None = None) -> Base:
    """The base in a model directory, under a name that means the same later and elsewhere.

    For a downloaded repository that is its own name and its commit, not the alias or branch that was asked for; for any
    other directory its whole path. "tiny" stays "tiny".
    """
    checkpoint = open_checkpoint(source)
    repository = hub.snapshot_of(checkpoint.directory)
    if repository is not None:
        name, revision = repository
    elif name.lower() != "tiny":
        name = str(checkpoint.directory)
    return Base(name, revision, fingerprint(checkpoint.weights))


def fingerprint(weights: Weights) -> str:
    """A hash of names, dtypes, shapes and samples of all weights, which does not depend on how files are sharded."""
    parts = []
    for file in weights.files:
        with file.open("rb") as data:
            start = 8 + int.from_bytes(data.read(8), "little")
            tensors = {name: tensor for name, tensor in weights.tensors.items() if weights.homes[name] == file}
            for name, tensor in tensors.items():  # in the order of their data, which has no holes
                digest = hashlib.sha256(f"{name} {tensor.dtype} {tensor.shape}".encode())
                for offset in sorted({0, tensor.nbytes // 2, max(0, tensor.nbytes - _SAMPLE)}):
                    data.seek(start + offset)
                    digest.update(data.read(min(_SAMPLE, tensor.nbytes - offset)))
                parts.append((name, digest.digest()))
                start += tensor.nbytes
    return hashlib.sha256(b"".join(digest for _, digest in sorted(parts))).hexdigest()[:32]


def adapter_files(
    adapters: Mapping[str, Adapter], layers: int, base: Base | None, **facts: Any
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors and the config of a folder. All ranks are padded with zeros to the largest, as mlx-lm has one rank.

    `layers` is the model's number of decoder layers; `facts` are further keys of the config.
    """
    rank = max(adapter.lora_a.shape[1] for adapter in adapters.values())
    tensors = {}
    for path, adapter in adapters.items():
        missing = rank - adapter.lora_a.shape[1]
        tensors[f"{path}.lora_a"] = mx.pad(adapter.lora_a, [(0, 0), (0, missing)])
        tensors[f"{path}.lora_b"] = mx.pad(adapter.separated(), [(0, missing), (0, 0)])
        if adapter.is_dora:
            tensors[f"{path}.m"] = adapter.m
    first = next(iter(adapters.values()))
    config = {
        "fine_tune_type": "dora" if first.is_dora else "lora",
        **_places(list(adapters), layers),
        **facts,
        "base_model": None if base is None else asdict(base),
    }
    config["lora_parameters"] |= {"rank": rank, "scale": first.scale, "dropout": first.dropout}
    return tensors, config


def _places(paths: list[str], layers: int) -> dict[str, Any]:
    """mlx-lm's settings for which layers are adapted: names in the last `num_layers` decoder layers, or whole paths."""
    within: dict[int, set[str]] = {}
    for path in paths:
        if path.startswith("model.layers."):
            _, _, number, name = path.split(".", 3)
            within.setdefault(int(number), set()).add(name)
    names = max(within.values(), key=len, default=set())
    regular = sum(map(len, within.values())) == len(paths) and all(adapted == names for adapted in within.values())
    if regular and sorted(within) == list(range(layers - len(within), layers)):
        return {"num_layers": len(within), "lora_parameters": {"keys": sorted(names)}}
    return {"num_layers": layers, "lora_parameters": {"keys": paths}}


def write_adapter(directory: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Write the two files into `directory`. They appear, or replace those that exist, when both are complete.

    Raises OSError.
    """
    with new_files(directory, last=CONFIG) as folder:
        write_pair(folder, CONFIG, config, WEIGHTS, tensors, "mlx")


def write_pair(
    folder: Path, config_name: str, config: Mapping[str, Any], name: str, tensors: Mapping[str, mx.array], made_for: str
) -> None:
    """Write a JSON file and a safetensors file. Raises OSError, also where MLX alone would raise RuntimeError."""
    (folder / config_name).write_text(json_text(config, indent=2) + "\n", encoding="utf-8")
    with named(folder / name), (folder / name).open("wb") as file:
        mx.save_safetensors(file, dict(tensors), {"format": made_for})


def read_adapter(directory: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors and the config of a folder. Raises AdapterError."""
    config = read_config_of(directory)
    return read_floats(directory / WEIGHTS), config


def read_config_of(directory: Path) -> dict[str, Any]:
    """The config of a folder whose two files exist and are complete. Raises AdapterError."""
    without = f", so it is no adapter folder; {instead_of_adapter(directory)}"
    config = checked_config(directory, CONFIG, WEIGHTS, without)
    check_config(directory, config)
    return config


def checked_config(directory: Path, config: str, weights: str, without: str) -> dict[str, Any]:
    """The JSON file `config`, if it and the safetensors file `weights` exist and are complete.

    Raises AdapterError; `without` ends the sentence that says which of them is missing.
    """
    for name in (config, weights):
        if not (directory / name).is_file():
            raise AdapterError(f"{directory} has no {name}{without}")
    try:
        value = read_json(directory / config)
        read_header(directory / weights)
    except CheckpointError as error:
        raise AdapterError(str(error).replace("; download it again", "; it is damaged")) from error
    return value


def read_floats(path: Path) -> dict[str, mx.array]:
    """The arrays of an adapter's safetensors file that `checked_config` has checked. Raises AdapterError."""
    try:
        arrays = read_arrays(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    for name, array in arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating) or not is_finite(array):
            raise AdapterError(f"{path} has {shorten(name, quote=False)}, whose numbers are not all finite floats")
    return arrays


def check_base(directory: Path, config: Mapping[str, Any], base: Base) -> None:
    """AdapterError if the adapter names other weights than `base`'s as its base; mlx-lm's adapters name none."""
    trained = config.get("base_model")
    if not isinstance(trained, Mapping) or trained.get("fingerprint") in (None, base.fingerprint):
        return
    named = shorten(str(trained.get("name")), quote=False)
    revision = f" at {shorten(str(trained['revision']), quote=False)}" if trained.get("revision") else ""
    weights = shorten(str(trained["fingerprint"])[:8], quote=False)
    raise AdapterError(
        f"{directory} was trained on {named}{revision} (weights {weights}), and this is "
        f"{base.name} (weights {base.fingerprint[:8]}); give the model it was trained on with model=NAME"
    )


def trained_on(directory: Path, config: Mapping[str, Any], revision: str | None = None) -> tuple[str, str | None]:
    """(name, revision) of the model that an adapter names as its base. Raises AdapterError if it names none."""
    revision = values.optional(values.text, revision, "revision")
    base = config.get("base_model")
    name = base.get("name") if isinstance(base, Mapping) else config.get("model")
    if not isinstance(name, str):
        raise AdapterError(f"{directory} does not say what it was trained on; give the model with model=NAME")
    if os.path.isabs(name) and not os.path.exists(name):
        raise AdapterError(f"{directory} was trained on {name}, which is not there; say where it is now with model=DIR")
    # A local directory has no revision, and a repository's is a commit.
    stored = base.get("revision") if isinstance(base, Mapping) and hub.is_repository(name) else None
    return name, revision or (stored if isinstance(stored, str) else None)


class Adapters:
    """Several adapters on one model, whose base stays in memory.

        adapters = Adapters(model, base)
        adapters.load("support", Path("adapters/support"))
        adapters.load("brief", Path("adapters/brief"))
        adapters.use({"support": 1.0, "brief": 0.5})    # or use("brief"), use(None)

    `base`, of `base_of`, is what every adapter must have been trained on; None checks nothing.
    """

    def __init__(self, model: Model, base: Base | None = None):
        self._model, self._base = model, base
        self._paths: dict[str, list[str]] = {}
        self._folders: dict[str, Path] = {}

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def load(self, name: str, directory: Path) -> None:
        """Read a folder and keep it under `name`; it is not in use before `use`. Raises AdapterError."""
        if not name or "." in name:
            raise OptionError(f"{name!r} cannot name an adapter; give a name without dots")
        self._keep(name, directory, *read_adapter(directory))

    def _keep(self, name: str, directory: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
        if self._base is not None:
            check_base(directory, config, self._base)
        if adapter_kind(directory, config) == "full":
            raise AdapterError(
                f"{directory} holds whole weights (full fine-tuning): phi3-mlx fuse makes a model of them"
            )
        made = make_adapters(directory, tensors, config, self._model)
        self.remove(name)
        for path, adapter in made.items():
            adapter.freeze()
            adapter.eval()
            layer = get_layer(self._model, path)
            if not isinstance(layer, AdaptedLinear):
                layer = AdaptedLinear(layer, {})
                layer.eval()
                set_layer(self._model, path, layer)
            layer.adapters[name] = adapter
        self._paths[name], self._folders[name] = list(made), directory

    def use(self, chosen: str | Mapping[str, float] | None) -> None:
        """Put these adapters in use with these weights (a name alone has weight 1), and no other."""
        weights = {} if chosen is None else {chosen: 1.0} if isinstance(chosen, str) else dict(chosen)
        for name, weight in weights.items():
            if name not in self._paths:
                raise OptionError(f"no adapter {name!r} is loaded; loaded are {', '.join(self._paths) or 'none'}")
            weights[name] = finite_weight(weight, str(self._folders[name]))
            self._check_weight(name, weights[name])
        for path in {path for paths in self._paths.values() for path in paths}:
            get_layer(self._model, path).use(weights)

    def _check_weight(self, name: str, weight: float) -> None:
        """OptionError if the adapter's numbers, times this weight, exceed what the model's dtype holds."""
        dtype, layers = self._model.dtype, [get_layer(self._model, path) for path in self._paths[name]]
        largest = max(1.0, *(layer.adapters[name].largest for layer in layers))
        if not abs(weight) * largest <= mx.finfo(dtype).max:
            raise OptionError(
                f"the weight of {self._folders[name]} is {weight:g}, which makes numbers beyond what {_spelled(dtype)} "
                "holds; give a smaller one"
            )

    def remove(self, name: str) -> None:
        """Forget an adapter and free its memory."""
        for path in self._paths.pop(name, []):
            layer = get_layer(self._model, path)
            layer.remove(name)
            if not layer.adapters:
                set_layer(self._model, path, layer.linear)


def apply(model: Model, base: Base | None, weights: Mapping[str, float]) -> None:
    """Put the adapters of these folders in use, each with its weight. Raises AdapterError."""
    adapters = Adapters(model, base)
    weights, names = {folder: finite_weight(weight, folder) for folder, weight in weights.items()}, {}
    for n, (folder, weight) in enumerate(weights.items()):
        directory = expanded(folder)
        tensors, config = read_adapter(directory)
        if adapter_kind(directory, config) == "full":
            if len(weights) > 1 or weight != 1.0:
                raise AdapterError(
                    f"{directory} holds whole weights, which do not mix with other adapters; give it alone"
                )
            if base is not None:
                check_base(directory, config, base)
            load_full(model, directory, tensors)
            return
        names[f"adapter {n}"] = weight
        adapters._keep(f"adapter {n}", directory, tensors, config)
    adapters.use(names)


def finite_weight(given: Any, folder: str) -> float:
    """The weight of an adapter as a float. Raises OptionError if it is no finite number."""
    weight = values.number(given, f"the weight of {folder}")
    if not math.isfinite(weight):
        raise OptionError(f"the weight of {folder} is {weight}; give a finite number")
    return weight


def make_adapters(
    directory: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any], model: Model
) -> dict[str, Adapter]:
    """The adapters of a folder by layer path, checked against the model's shapes and type. Raises AdapterError."""
    scale, dora = scale_in(directory, config), adapter_kind(directory, config) == "dora"
    layers: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b", "m"):
            _refuse(directory, f"{WEIGHTS} has {shorten(name, quote=False)}, which is no part of an adapter")
        layers.setdefault(path, {})[leaf] = array.astype(mx.float32)
    known = {path.removesuffix(".linear"): layer for path, layer in model.named_modules() if "weight" in layer}
    adapters = {}
    for path, leaves in layers.items():
        rows, columns = layer_shape(_linear(directory, path, known.get(path)))
        a, b, m = _checked_leaves(directory, path, leaves, rows, columns, dora=dora)
        adapters[path] = Adapter(a, b, scale, m=m)
        if not adapters[path].largest <= mx.finfo(model.dtype).max:
            _refuse(
                directory,
                f"{path} has numbers beyond what {_spelled(model.dtype)} holds, lora_parameters.scale {scale:g} among "
                "them; load the model in a larger dtype, or train it again",
            )
    if not adapters:
        _refuse(directory, f"{WEIGHTS} is empty")
    return adapters


def _linear(directory: Path, path: str, layer: nn.Module | None) -> nn.Module:
    """The model's layer at `path`, if it is one that adapters can change. Raises AdapterError."""
    if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
        _refuse(directory, f"it changes {path}, and adapters of the embedding are not supported; train without it")
    if layer is None:
        tied = ": its output layer is its embedding" if path == "lm_head" else ""
        _refuse(directory, f"it changes {path}, which this model does not have{tied}")
    if not isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
        what = "of experts" if layer.weight.ndim > 2 else "of what is no linear layer"
        _refuse(directory, f"it changes {path}, and {what} adapters are not supported; train one of attention")
    return layer


def _checked_leaves(
    directory: Path, path: str, leaves: Mapping[str, mx.array], rows: int, columns: int, *, dora: bool
) -> tuple[mx.array, mx.array, mx.array | None]:
    """`lora_a` (columns, rank), `lora_b` (rank, rows) and, for DoRA alone, `m` (rows,). Raises AdapterError."""
    a, b, m = leaves.get("lora_a"), leaves.get("lora_b"), leaves.get("m")
    if a is None or b is None:
        _refuse(directory, f"{path} has no {'lora_a' if a is None else 'lora_b'}")
    if (m is not None) != dora:
        kind, has = ("dora", "no") if dora else ("lora", "an")
        _refuse(directory, f"fine_tune_type is {kind}, and {path} has {has} m")
    if b.ndim != 2 or not b.shape[0] or a.shape != (columns, b.shape[0]) or b.shape[1:] != (rows,):
        _refuse(
            directory,
            f"{path} has lora_a {a.shape} and lora_b {b.shape}, but the layer turns {columns} into {rows}",
        )
    if m is not None and m.shape != (rows,):
        _refuse(directory, f"{path} has m {m.shape}, but the layer has {rows} outputs")
    return a, b, m


def layer_shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, packed or not."""
    rows, columns = linear.weight.shape
    return rows, columns * 32 // linear.bits if "scales" in linear else columns


def load_full(model: Model, directory: Path, tensors: Mapping[str, mx.array]) -> None:
    """Put the whole weights of a full fine-tuning in place. Raises AdapterError."""
    parameters = dict(tree_flatten(model.parameters()))
    for name, array in tensors.items():
        if name not in parameters or parameters[name].shape != array.shape:
            _refuse(directory, f"it has {name} {array.shape}, which this model does not have in that shape")
        if not is_finite(array.astype(parameters[name].dtype)):
            _refuse(directory, f"{name} has values that are not finite in {_spelled(parameters[name].dtype)}")
    model.load_weights([(name, array.astype(parameters[name].dtype)) for name, array in tensors.items()], strict=False)


def _spelled(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _refuse(directory: Path, why: str) -> NoReturn:
    raise AdapterError(f"{directory} does not fit: {why}")
