"""GGUF files as a source: the architectures `phi3`, `phimoe` and `llama`, in every type that the library dequantizes.

What llama.cpp's converter does to a checkpoint is undone here: names, the order of Llama's query and key rows,
LongRoPE's factor lists as tensors. Source: its conversion/phi.py and llama.py, and gguf's constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError, ConfigError
from ...models import parse_config, shapes
from ...store.safetensors import Tensor
from ..sources import Blocks
from ..split import require
from ..writer import write_json
from .file import BLOCKS, GgufFile
from .metadata import JITTER_KEY, MSCALE_KEYS
from .tensor_names import LONG_FACTORS, ROUTER, SHORT_FACTORS, llama_cpp_name
from .tokenizer import tokenizer_files

_ARCHITECTURES = ("phi3", "llama", "phimoe")
# Metadata under the architecture's name that `_Config` reads, and such as says nothing about the numbers.
_READ = {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
         "attention.value_length", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
         "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
         "rope.scaling.original_context_length"}  # fmt: skip
_READ_OF_EXPERTS = {"expert_count", "expert_used_count", "attention.layer_norm_epsilon"}
_INERT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_FACTORS = {"short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# What multiplies cos and sin in Phi-3.5-MoE, the one release that has experts and LongRoPE.
_RELEASED_MSCALE = 1.243163121016122


class GgufSource:
    """A GGUF file as the tensors of a Phi-3 or Phi-3.5-MoE checkpoint (the interface `Source`).

    Values packed in blocks are read as float32, exactly what the file says; `config.dtype` is what
    suits the model: "float16" or "float32" for files of such, else "bfloat16", in which Phi-3 was trained.

    Raises CheckpointError (the file, or its tensors), ConfigError (what its metadata asks for), TokenizerError.
    """

    quantization: Mapping[str, Any] | None = None

    def __init__(self, path: Path):
        self.name = str(path)
        self._file = GgufFile(path)
        reader = _Config(self._file)
        self.raw_config = reader.config()
        self.config = config = parse_config(self.raw_config, self.name)
        stored = {name: tensor.shape for name, tensor in self._file.tensors.items() if name not in _FACTORS.values()}
        wanted = shapes(config)
        self._parts = {name: _parts(name, stored) for name in wanted}
        require(stored, self._parts, config, self.name)
        self._orders: dict[str, np.ndarray] = {}
        if reader.architecture == "llama":
            for i in range(config.num_hidden_layers):
                for name, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
                    self._orders[f"blk.{i}.{name}.weight"] = _unpermuted(heads, config.head_dim)
        title = self._file.metadata.get("general.name")
        self.metadata_name = title if isinstance(title, str) else None
        self._extras = tokenizer_files(self._file.metadata, self.name)
        if self._extras.tokenizer_size > config.vocab_size:
            self._file.fail(
                f"has {self._extras.tokenizer_size:,} tokens, but its embedding has {config.vocab_size:,} rows: "
                "use another GGUF of the model"
            )
        ids = {key: self._extras.generation_config.get(key) for key in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = next(iter(self._extras.generation_config.get("eos_token_id", [])), None)
        self.raw_config |= {key: value for key, value in ids.items() if value is not None}
        self.tensors = {name: self._tensor(name, shape) for name, shape in wanted.items()}
        kinds = {name: {self._file.tensors[part].type for part in parts} for name, parts in self._parts.items()}
        self.blocks: Mapping[str, Blocks] = {
            name: Blocks(
                {"group_size": 32, "bits": BLOCKS[next(iter(types))], "mode": "affine"},
                partial(self._read_blocks, name),
            )
            for name, types in kinds.items()
            if types <= set(BLOCKS) and len({BLOCKS[kind] for kind in types}) == 1
        }

    def _read_blocks(self, name: str) -> list[mx.array]:
        """Weight, scales and biases of a tensor of `blocks`; scales and biases are float16."""
        parts = [self._file.read_blocks(part, self._orders.get(part)) for part in self._parts[name]]
        return [mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]

    def read(self, name: str) -> mx.array:
        """A tensor of `tensors`, in that dtype."""
        parts = [self._file.read(part, self._orders.get(part)) for part in self._parts[name]]
        if len(parts) == 1:
            return parts[0]
        whole = parts[0].dtype if len({part.dtype for part in parts}) == 1 else mx.float32
        return mx.concatenate([part.astype(whole) for part in parts])

    def float_type(self, name: str) -> str | None:
        """The type of floats that a tensor is stored in; None where it is packed."""
        floats = all(self._file.tensors[part].type in _SIZES for part in self._parts[name])
        return self.tensors[name].dtype if floats else None

    def write_extras(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
        files = {
            "tokenizer.json": self._extras.tokenizer,
            "tokenizer_config.json": self._extras.tokenizer_config,
            "generation_config.json": self._extras.generation_config,
        }
        for name, value in files.items():
            write_json(directory / name, value)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        kinds = {self._file.tensors[part].dtype for part in self._parts[name]}
        dtype = kinds.pop() if len(kinds) == 1 else "F32"
        return Tensor(dtype, shape, math.prod(shape) * _SIZES[dtype])


class _Config:
    """Reads the metadata of one file into a config.json, naming the file and the key in whatever it refuses."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            self.fail(f"is of the architecture {self.architecture!r}; those that can be converted are {known}")
        self.has_experts = self.architecture == "phimoe"
        self.model_type = "phimoe" if self.has_experts else "phi3"
        kind = file.metadata.get("general.type", "model")
        if kind != "model":
            self.fail(f"holds no model but a part of one (general.type {kind!r}); name the GGUF of the model itself")
        prefix = f"{self.architecture}."
        self.values = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
        said = _READ | _INERT | (_READ_OF_EXPERTS if self.has_experts else set())
        for key, value in self.values.items():
            if key not in said and value not in (0, "", "none"):
                self.fail(f"has {prefix}{key} {_shorten(value)}, which is not supported for {self.model_type}")
        if "rope_freqs.weight" in file.tensors:
            self.fail("has rope_freqs.weight: its RoPE is scaled as Llama 3's, which phi3 cannot compute")

    def fail(self, why: str) -> NoReturn:
        raise ConfigError(f"{self.file.path} {why}")

    def number(self, key: str, default: Any = None, kind: type = int) -> Any:
        """The value of a key of the architecture's."""
        return self.checked(f"{self.architecture}.{key}", self.values.get(key, default), kind)

    def checked(self, key: str, value: Any, kind: type) -> Any:
        if value is None:
            self.fail(f"has no {key} in its metadata; use a newer GGUF of the model")
        kinds = (int,) if kind is int else (int, float)
        if type(value) not in kinds or not 0 < value < 1e18:  # NaN fails it too
            name = "integer" if kind is int else "number"
            self.fail(f"has {key} {_shorten(value)}, expected a positive {name}")
        # Stored as float32: 1e-05 rather than 9.999999747378752e-06, which is the same float32.
        return value if kind is int else float(str(np.float32(value)))

    def config(self) -> dict[str, Any]:
        tensors = self.file.tensors
        if "token_embd.weight" not in tensors:
            raise CheckpointError(f"{self.file.path} has no token_embd.weight; use another GGUF of the model")
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        longest = self.number("context_length")
        if hidden % heads and "attention.key_length" not in self.values:
            self.fail(f"has {heads} heads for {hidden} hidden dims, which does not divide")
        head_dim = self.number("attention.key_length", hidden // heads)
        if self.number("attention.value_length", head_dim) != head_dim:
            self.fail("has values of another length than its keys, which phi3 cannot compute")
        rotated = self.number("rope.dimension_count", head_dim)
        if rotated != head_dim and (self.architecture == "llama" or int(head_dim * (rotated / head_dim)) != rotated):
            self.fail(f"rotates {rotated} of {head_dim} dims, which cannot be brought into phi3's order")
        config = {
            "architectures": ["PhiMoEForCausalLM" if self.has_experts else "Phi3ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self.number("feed_forward_length"),
            "max_position_embeddings": longest,
            "num_attention_heads": heads,
            "num_hidden_layers": self.number("block_count"),
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", kind=float),
            "rope_theta": self.number("rope.freq_base", 10000.0, float),
            "sliding_window": self.window(longest),
            "tie_word_embeddings": "output.weight" not in tensors,
            "torch_dtype": self.dtype(),
            "vocab_size": tensors["token_embd.weight"].shape[0],
        }
        if head_dim * heads != hidden:
            config["head_dim"] = head_dim
        if rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
        return config | self.rope(longest) | (self.experts() if self.has_experts else {})

    def experts(self) -> dict[str, Any]:
        """What only a mixture of experts has. llama.cpp has no place for the router's jitter, our export has."""
        return {
            "num_local_experts": self.number("expert_count"),
            "num_experts_per_tok": self.number("expert_used_count", 2),
            "router_jitter_noise": self.checked(JITTER_KEY, self.file.metadata.get(JITTER_KEY, 0.01), float),
            "attention_bias": "blk.0.attn_q.bias" in self.file.tensors,
            "lm_head_bias": "output.bias" in self.file.tensors,
        }

    def window(self, longest: int) -> int | None:
        if self.values.get("attention.sliding_window") == 0:
            return None
        if "attention.sliding_window" in self.values:
            return self.number("attention.sliding_window")
        # Files older than August 2024 leave it out; these are the 4k models, which have one.
        four_k = self.architecture == "phi3" and longest == 4096 and self.number("block_count") in (32, 40)
        return 2047 if four_k else None

    def rope(self, longest: int) -> dict[str, Any]:
        """`rope_scaling` and the original length."""
        factors = {key: name for key, name in _FACTORS.items() if name in self.file.tensors}
        kind, factor = self.values.get("rope.scaling.type", "none"), self.values.get("rope.scaling.factor", 1)
        if len(factors) == 1:
            self.fail(
                f"has {next(iter(factors.values()))} but not LongRoPE's other list; use another GGUF of the model"
            )
        if kind not in (("longrope", "none") if factors else ("none",)) or factor not in (0, 1):
            missing = " without its factor lists" if kind == "longrope" and not factors else ""
            self.fail(f"has RoPE scaling {kind!r}, factor {factor!r}{missing}, which phi3 cannot compute")
        if not factors:
            if self.number("rope.scaling.attn_factor", 1, float) != 1:
                self.fail(f"has {self.architecture}.rope.scaling.attn_factor without LongRoPE, which phi3 cannot do")
            return {"rope_scaling": None, "original_max_position_embeddings": longest}
        original = self.number("rope.scaling.original_context_length")
        scaling: dict[str, Any] = {"type": "longrope"}
        for key, name in factors.items():
            # As decimals: the shortest that give this float32 again.
            scaling[key] = [float(str(value)) for value in np.array(self.file.read(name).astype(mx.float32))]
        unusual = self.unusual_factor(longest, original)
        if self.has_experts:
            # llama.cpp's converter writes the usual factor, whatever the model's own are.
            for name, key in MSCALE_KEYS.items():
                given = self.file.metadata.get(key)
                scaling[name] = (unusual or _RELEASED_MSCALE) if given is None else self.checked(key, given, float)
        elif unusual is not None:
            scaling["attention_factor"] = unusual
        return {"rope_scaling": scaling, "original_max_position_embeddings": original}

    def unusual_factor(self, longest: int, original: int) -> float | None:
        """The attention factor; None for the one that follows from the lengths."""
        if "rope.scaling.attn_factor" not in self.values or original == 1:
            return None
        given: float = self.number("rope.scaling.attn_factor", kind=float)
        usual = math.sqrt(1 + math.log(max(longest, original) / original) / math.log(original))
        return None if abs(given - usual) <= 1e-6 * usual else given

    def dtype(self) -> str:
        tensors = self.file.tensors.items()  # routers are in float32 in every file
        kinds = {tensor.type for name, tensor in tensors if len(tensor.shape) > 1 and not name.endswith(ROUTER)}
        return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")


def _parts(target: str, stored: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors of a GGUF file whose rows make up `target`."""
    whole = llama_cpp_name(target)
    stem = whole.removesuffix("attn_qkv.weight").removesuffix("ffn_up.weight")
    if whole.endswith(".attn_qkv.weight") and whole not in stored:
        return tuple(f"{stem}attn_{part}.weight" for part in "qkv")
    if whole.endswith(".ffn_up.weight") and f"{stem}ffn_gate.weight" in stored:
        return (f"{stem}ffn_gate.weight", whole)
    return (whole,)


def _unpermuted(heads: int, dim: int) -> np.ndarray:
    """Which row of a Llama file's query or key projection is each row of the original.

    llama.cpp rotates neighbours (2k, 2k + 1) where the original rotates k and k + dim / 2.
    """
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
