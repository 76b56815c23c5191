"""A model directory as the source of a conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import Config, read_json
from ..errors import CheckpointError
from ..fields import shorten
from ..models import parse_config, shapes
from ..paths import no_model
from ..store.assembly import assemble
from ..store.checkpoint import read_array
from ..store.companions import copy_companions
from ..store.hub import COMPANIONS
from ..store.quantization import FLOATS, find_packing
from ..store.safetensors import Tensor, find_weights, lacks
from .sources import SPELLING, Blocks, tensor_of, to_mlx
from .split import find_parts, phi3_config

_EXTRAS = (*COMPANIONS, "LICENSE*", "NOTICE*")  # the licence, because it asks to be kept with the model


class DirectorySource:
    """A directory in Hugging Face's format or MLX's: in shards or not, packed or not, projections fused or split.

    By the names in its files: `stored` has the tensors as they are there, `dequantized` what they are in floats,
    without scales and biases, and `packings` how each packed weight is packed.
    """

    blocks: Mapping[str, Blocks] = {}

    def __init__(self, directory: Path):
        self.name = str(directory)
        self._directory = directory
        if not (directory / "config.json").exists():
            raise CheckpointError(no_model(directory))
        where = str(directory / "config.json")
        raw = read_json(directory / "config.json")
        weights = find_weights(directory)
        self._weights, self.stored = weights, weights.tensors
        self.quantization = raw.pop("quantization", None)
        if isinstance(raw.get("quantization_config"), Mapping) and "quant_method" not in raw["quantization_config"]:
            del raw["quantization_config"]  # it repeats the other, or was left by a tool that dequantized
        if self.quantization is not None and not isinstance(self.quantization, Mapping):
            raise CheckpointError(f"{where}: quantization is {shorten(self.quantization)}, expected an object")
        self.raw_config = phi3_config(raw, self.name)
        self.raw_config.pop("auto_map", None)  # names code files, and code is not copied
        self.config = parse_config(self.raw_config, self.name)
        self.packings = self._find_packings(where)
        if not self.packings:  # the config has kept what a tool has dequantized
            self.quantization = None
        self.dequantized = {name: self._dequantized(name) for name in self.stored if not self._belongs_to_packed(name)}
        try:
            self._parts = find_parts(self.config, self.dequantized, self.name)
        except CheckpointError as error:
            if weights.absent:
                raise CheckpointError(lacks(directory, weights.absent)) from error
            raise
        self.tensors = {
            name: tensor_of(self._dtype_of(self._parts[name]), shape) for name, shape in shapes(self.config).items()
        }
        self._check_tied()

    def read(self, name: str) -> mx.array:
        dtype = to_mlx(self.tensors[name].dtype)  # for parts of different ones
        read = lambda part: self._part(part).astype(dtype)  # noqa: E731
        return assemble(self.config, name, self._parts[name], self.tensors[name].shape, read)

    def float_type(self, name: str) -> str | None:
        """The type of floats that a tensor is stored in; None where it is packed."""
        return None if any(part in self.packings for part in self._parts[name]) else self.tensors[name].dtype

    def write_extras(self, directory: Path) -> None:
        copy_companions(self._directory, directory, _EXTRAS)

    def _part(self, name: str) -> mx.array:
        packing = self.packings.get(name)
        if packing is None:
            return self.load(name)
        path = name.removesuffix(".weight")
        biases = self.load(f"{path}.biases") if packing["mode"] == "affine" else None
        dtype = to_mlx(self.dequantized[name].dtype)
        return mx.dequantize(self.load(name), self.load(f"{path}.scales"), biases, **packing, dtype=dtype)

    def load(self, name: str) -> mx.array:
        """A tensor of `stored`, as it is there."""
        return read_array(self._weights, name)

    def _dtype_of(self, parts: Sequence[str]) -> str:
        """What a tensor that is stored as `parts` is read in. CheckpointError for a part that holds no floats."""
        dtypes = {self.dequantized[part].dtype: part for part in reversed(parts)}
        for dtype, part in dtypes.items():
            if dtype not in FLOATS:
                expected = " or ".join(FLOATS)
                raise CheckpointError(f"{self.name}: {part} is stored as {dtype}, expected {expected}")
        return next(iter(dtypes)) if len(dtypes) == 1 else "F32"

    def _find_packings(self, where: str) -> dict[str, dict[str, Any]]:
        """Group size, bits and mode of every packed weight, by its name."""
        packings = {}
        paths = [name.removesuffix(".scales") for name in self.stored if name.endswith(".scales")]
        if paths and self.quantization is None:
            raise CheckpointError(
                f"{self.name} holds packed weights ({paths[0]}.scales), but its config.json has no quantization; "
                "download it again"
            )
        for path in paths:
            assert self.quantization is not None
            packing = find_packing(path, _width(path, self.config), self.quantization, self.stored, where)
            parts = ("weight", "scales", "biases") if packing and packing["mode"] == "affine" else ("weight", "scales")
            missing = next((part for part in parts if f"{path}.{part}" not in self.stored), None)
            if packing is None or missing is not None:
                why = f"{path}.{missing} is missing" if packing else f"config.json says {path} is not packed"
                raise CheckpointError(f"{self.name} holds {path}.scales, but {why}; download it again")
            self._check_packed(path, packing)
            packings[f"{path}.weight"] = packing
        return packings

    def _check_packed(self, path: str, packing: Mapping[str, Any]) -> None:
        """CheckpointError unless the shapes of a packed layer belong together."""
        weight, scales = self.stored[f"{path}.weight"], self.stored[f"{path}.scales"]
        biases = self.stored.get(f"{path}.biases")
        width = scales.shape[-1] * packing["group_size"] if len(scales.shape) in (2, 3) else 0
        expected = (*scales.shape[:-1], width * packing["bits"] // 32)
        affine = packing["mode"] == "affine"
        if (
            weight.shape != expected
            or weight.dtype != "U32"
            or (scales.dtype not in FLOATS if affine else scales.dtype != "U8")
            or (affine and (biases is None or biases.shape != scales.shape))
        ):
            raise CheckpointError(
                f"{self.name}: {path} is packed as weight {weight.dtype} {weight.shape} with scales {scales.dtype} "
                f"{scales.shape}, which is not {dict(packing)} as config.json says; download it again"
            )

    def _belongs_to_packed(self, name: str) -> bool:
        path, _, kind = name.rpartition(".")
        return kind in ("scales", "biases") and f"{path}.weight" in self.packings

    def _dequantized(self, name: str) -> Tensor:
        """What a stored tensor is in floats."""
        packing = self.packings.get(name)
        if packing is None:
            return self.stored[name]
        scales = self.stored[f"{name.removesuffix('.weight')}.scales"]
        dtype = scales.dtype if packing["mode"] == "affine" else SPELLING.get(self.config.dtype or "", "BF16")
        return tensor_of(dtype, (*scales.shape[:-1], scales.shape[-1] * packing["group_size"]))

    def _check_tied(self) -> None:
        """CheckpointError where the head is tied to the embedding, but a different head is stored."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if head in self.tensors or head not in self.stored:
            return
        if not mx.array_equal(self._part(head), self._part(embedding)):
            raise CheckpointError(
                f"{self.name}: tie_word_embeddings is true, but {head} differs from {embedding}; set "
                "tie_word_embeddings to false in config.json"
            )


def _width(path: str, config: Config) -> int:
    """The input width of the linear layer or embedding `path`."""
    if path.endswith((".down_proj", ".w2")):
        return config.intermediate_size
    if path.endswith((".o_proj", ".dense")):
        return config.num_attention_heads * config.head_dim
    return config.hidden_size
