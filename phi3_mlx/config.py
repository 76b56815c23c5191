"""config.json -> a frozen, validated `Phi3Config`. Field names and meanings are Hugging Face's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class LongRope:
    """LongRoPE's two factor lists and its attention factor (arXiv 2402.13753; transformers `longrope`).

    `short_factor` and `long_factor` have one entry a rotated pair (rotary dims / 2); `attention_factor`
    multiplies cos and sin, at every length.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class Phi3Config:
    """A dense Phi-3 model (`model_type: phi3`): Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    longrope: LongRope | None
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str | None
    quantization: Mapping[str, Any] | None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it cannot be read or is not an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers or nesting beyond reason
        raise CheckpointError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object; download the file again")
    return value


def read_config(directory: Path) -> Phi3Config:
    """The validated config of a model directory. Raises CheckpointError (no file) or ConfigError (its content)."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json, so it is not a model directory; name one that has")
    return parse_config(read_json(path), str(path))


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> Phi3Config:
    """Validate the dictionary of a config.json; `source` names it in the ConfigError."""
    return _Reader(raw, source).phi3()


# Keys that change the numbers when they are not at this value, and that this package does not compute.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "embedding_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "layer_types": (),
    "quantize_activations": (False,),
    "quantization_config": (),  # GPTQ, AWQ, bitsandbytes...: packed in ways mlx does not read
}

_SUPPORTED = "phi3 (Phi-3 mini/medium, Phi-3.5-mini, Phi-4, Phi-4-mini)"


class _Reader:
    """Reads one config.json, naming the file and the key in whatever it refuses."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source
        # transformers 5 writes `rope_parameters` with theta and friends inside; older files `rope_scaling`.
        given = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None]
        if len(given) == 2 and raw[given[0]] != raw[given[1]]:
            self.fail("rope_parameters and rope_scaling are both given and differ; remove one of them")
        self.rope_key = given[0] if given else "rope_scaling"
        rope = raw[self.rope_key] if given else {}
        if not isinstance(rope, Mapping):
            self.fail(f"{self.rope_key} is {rope!r}, expected an object or null")
        self.rope: Mapping[str, Any] = rope

    def fail(self, why: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {why}")

    def number(self, key: str, default: Any = None, kind: type = int, where: Mapping[str, Any] | None = None) -> Any:
        value = (self.raw if where is None else where).get(key)
        value = default if value is None else value
        if value is None:
            self.fail(f"{key} is missing")
        # The bound keeps what follows from overflowing; NaN fails it too.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e18:
            self.fail(f"{key} is {_shorten(value)}, expected a number")
        if value <= 0 or kind(value) != value:
            self.fail(f"{key} is {value!r}, expected a positive {'integer' if kind is int else 'number'}")
        return kind(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key) or False
        if not isinstance(value, bool):
            self.fail(f"{key} is {value!r}, expected true or false")
        return value

    def phi3(self) -> Phi3Config:
        raw, rope = self.raw, self.rope
        model_type = raw.get("model_type")
        if model_type != "phi3":
            self.fail(f"model_type {model_type!r} is not supported; this version runs {_SUPPORTED}")
        for key, allowed in _MUST_BE.items():
            value = raw.get(key)
            # MLX conversions repeat their own `quantization` under the Hugging Face key.
            repeated = key == "quantization_config" and value == raw.get("quantization")
            if value is not None and value not in allowed and not repeated:
                self.fail(f"{key} {_shorten(value)} is not supported for phi3, so its outputs would be wrong")
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        kv_heads = self.number("num_key_value_heads", heads)
        if heads % kv_heads:
            self.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if raw.get("head_dim") is None and hidden % heads:
            self.fail(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = self.number("head_dim", hidden // heads)
        partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        partial = self.number("partial_rotary_factor", 1.0, float, {"partial_rotary_factor": partial})
        rotary_dim = int(head_dim * partial)
        if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
            self.fail(f"partial_rotary_factor {partial} of head_dim {head_dim} gives {rotary_dim} rotated dims")
        longest = self.number("max_position_embeddings")
        # The top-level original length wins over the one inside rope_scaling, as in transformers.
        inner = self.number("original_max_position_embeddings", min(longest, 4096), where=rope)
        original = self.number("original_max_position_embeddings", inner)
        if original > longest:
            self.fail(f"original_max_position_embeddings {original} exceeds max_position_embeddings {longest}")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0, float), float, rope)
        quantization = raw.get("quantization")
        if quantization is not None and not isinstance(quantization, Mapping):
            self.fail(f"quantization is {quantization!r}, expected an object")
        window = raw.get("sliding_window")
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        if dtype is not None and not isinstance(dtype, str):
            self.fail(f"torch_dtype is {dtype!r}, expected a name such as 'bfloat16'")
        return Phi3Config(
            model_type="phi3",
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.number("intermediate_size"),
            num_hidden_layers=self.number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", 1e-5, float),
            rope_theta=theta,
            rotary_dim=rotary_dim,
            max_position_embeddings=longest,
            original_max_position_embeddings=original,
            longrope=self.longrope(rotary_dim, longest, original),
            sliding_window=None if window is None else self.number("sliding_window"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            dtype=dtype,
            quantization=quantization,
        )

    def longrope(self, rotary_dim: int, longest: int, original: int) -> LongRope | None:
        rope = self.rope
        kinds = {key: rope[key] for key in ("type", "rope_type") if rope.get(key) is not None}
        if not kinds:
            unread = set(rope) - {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
            if unread:
                self.fail(f"{self.rope_key} has {', '.join(sorted(map(str, unread)))} but no type; known: longrope")
            return None
        # "su" is the name of April 2024; transformers reads Phi-3's "yarn" as longrope too.
        spelled = ["longrope" if kind in ("su", "yarn") else kind for kind in kinds.values()]
        if all(kind == "default" for kind in spelled):
            return None
        if any(kind != "longrope" for kind in spelled):
            named = " / ".join(_shorten(kind) for kind in kinds.values())
            self.fail(f"rope type {named} is not supported; known: longrope")
        if original == 1:
            self.fail("original_max_position_embeddings is 1, which leaves LongRoPE nothing to extend")
        factor = self.number("factor", longest / original, float, rope)
        automatic = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return LongRope(
            short_factor=self.factors("short_factor", rotary_dim // 2),
            long_factor=self.factors("long_factor", rotary_dim // 2),
            attention_factor=self.number("attention_factor", automatic, float, rope),
        )

    def factors(self, key: str, length: int) -> tuple[float, ...]:
        values = self.rope.get(key)
        if not isinstance(values, list):
            self.fail(f"{self.rope_key}.{key} is {_shorten(values)}, expected a list of {length} numbers")
        if len(values) != length:
            self.fail(f"{self.rope_key}.{key} has {len(values)} entries, expected {length} (half of the rotated dims)")
        return tuple(self.number(f"{key}[{i}]", kind=float, where={f"{key}[{i}]": v}) for i, v in enumerate(values))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
