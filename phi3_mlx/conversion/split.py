"""Checkpoints in the layout of Llama and Mistral, and how they become Phi-3's.

Phi-3's architecture contains theirs: its `qkv_proj` holds the rows of `q_proj`, `k_proj` and `v_proj` one after the
other, its `gate_up_proj` those of `gate_proj` and `up_proj`. Phi-3 itself is re-published in their layout, too.
What their configs may ask for and Phi-3 does not compute is refused by name. Source: transformers' `LlamaConfig`,
`MistralConfig`, their models, and `modeling_rope_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..config import ROPE_KEYS, Config
from ..errors import CheckpointError, ConfigError
from ..fields import shorten
from ..models import ARCHITECTURES, check_layers, parse_config, shapes
from ..store.assembly import origin, part_shapes
from ..store.safetensors import Tensor

# What transformers takes where a config.json lacks the key; Phi-3's own defaults are others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_CARRIED = (*_SIZE_KEYS, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
_CARRIED_IF_GIVEN = ("head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout",
                     "initializer_range", "use_cache", "quantization", "quantization_config")  # fmt: skip
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "num_local_experts": (0, 1),
}
_LISTED = 20  # faults shown; a wrong config makes hundreds


def find_parts(config: Config, tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[str, ...]]:
    """The names of what a checkpoint stores for each tensor of the model, in the model's order.

    `assembly.assemble` makes the tensor of these. `config` is the model's, `tensors` are the checkpoint's by name,
    dequantized; `source` names it in errors. Raises CheckpointError where tensors are missing, of a shape the config
    does not give, or not Phi-3's (biases): all of them listed.
    """
    check_layers(config, tensors, source)
    parts = {name: origin(config, name, tensors) for name in shapes(config)}
    stored = {name: tensor.shape for name, tensor in tensors.items() if not config.is_unused(name)}
    require(stored, parts, config, source)
    return parts


def require(
    stored: Mapping[str, tuple[int, ...]], parts: Mapping[str, tuple[str, ...]], config: Config, source: str
) -> None:
    """CheckpointError unless the tensors `stored`, by shape, are those of `parts`, all and no others.

    `parts` gives for each of Phi-3's tensors the names of those that make it up.
    """
    faults = []
    for target, shape in shapes(config).items():
        for name, wanted in zip(parts[target], part_shapes(config, target, shape, parts[target]), strict=True):
            if name not in stored:
                faults.append(f"missing {name}")
            elif stored[name] != wanted:
                faults.append(f"{name}: shape {stored[name]}, expected {wanted}")
    used = {name for names in parts.values() for name in names}
    faults += [f"unexpected {name}" for name in stored if name not in used]
    if faults:
        raise CheckpointError(_listing(source, faults))


def phi3_config(raw: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The config.json of the Phi-3 model that computes what `raw` asks for: itself, or of Llama's or Mistral's kind."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*ARCHITECTURES, *_DEFAULTS}:
        _fail(source, f"model_type {shorten(model_type)} is not supported; phi3, llama and mistral can be converted")
    if model_type in ARCHITECTURES:
        return dict(raw)
    if all(raw.get(key) for key in ROPE_KEYS):
        old, new = (phi3_config({**raw, other: None}, source) for other in ROPE_KEYS)
        if parse_config(old, source) != parse_config(new, source):
            _fail(source, "rope_parameters and rope_scaling are both given and differ; remove one of them")
        return new
    for key, allowed in _MUST_BE.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            _fail(source, f"{key} {shorten(raw[key])} of this {model_type} model is not supported for phi3")
    for key in _SIZE_KEYS:
        if raw.get(key) is None:
            _fail(source, f"{key} is missing")
    # Of these null says: no window, as many as heads; where a missing key says Mistral's 4096 and 8.
    telling = ("sliding_window", "num_key_value_heads")
    given = _DEFAULTS[model_type] | {key: value for key, value in raw.items() if value is not None or key in telling}
    config: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu"}
    config |= {key: given[key] for key in _CARRIED if given[key] is not None}
    config |= {key: raw[key] for key in _CARRIED_IF_GIVEN if raw.get(key) is not None}
    config["tie_word_embeddings"] = raw.get("tie_word_embeddings") or False
    config["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    config["sliding_window"] = _window(model_type, given, source)
    config |= _rope(given, source)
    return {key: value for key, value in config.items() if key != "torch_dtype" or value is not None}


def _window(model_type: str, given: Mapping[str, Any], source: str) -> int | None:
    """`sliding_window` for Phi-3, which means by it what Mistral does: query i sees the keys i - window < j <= i."""
    window, longest = given.get("sliding_window"), given["max_position_embeddings"]
    if model_type == "llama":
        # transformers' Llama sees every key, but sizes the cache of its generate() by this.
        if window is not None and not (isinstance(window, int) and isinstance(longest, int) and window >= longest):
            _fail(source, f"sliding_window {shorten(window)} is given, but a llama model has none; set it to null")
        window = None
    kinds, kind = given.get("layer_types") or [], "full_attention" if window is None else "sliding_attention"
    if not isinstance(kinds, list) or any(layer_type != kind for layer_type in kinds):
        _fail(source, f"layer_types {shorten(kinds)} are not all {kind}, which phi3 cannot compute")
    return window


def _rope(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the original length."""
    keys = [key for key in ROPE_KEYS if given.get(key)] or ["rope_scaling"]  # one of them, see `phi3_config`
    rope = {} if given.get(keys[0]) is None else given[keys[0]]
    if not isinstance(rope, Mapping):
        _fail(source, f"{keys[0]} is {shorten(rope)}, expected an object or null")
    longest = given["max_position_embeddings"]
    original = given.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    result = {
        "rope_theta": rope.get("rope_theta") or given.get("rope_theta") or 10000.0,
        "rope_scaling": None,
        "original_max_position_embeddings": original or longest,
    }
    kinds = [rope[key] for key in ("type", "rope_type") if rope.get(key) is not None]
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        given_part = shorten(rope["partial_rotary_factor"])
        _fail(source, f"partial_rotary_factor {given_part} is not supported for llama or mistral")
    if all(kind == "default" for kind in kinds):
        # Without LongRoPE the original length has no meaning, and one above the longest would be refused.
        return result | {"original_max_position_embeddings": longest}
    if others := [shorten(kind) for kind in kinds if kind != "longrope"]:
        _fail(source, f"rope type {' / '.join(others)} is not supported for phi3; it has none and longrope")
    scaling = {"type": "longrope", "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    scaling |= {key: rope[key] for key in ("factor", "attention_factor") if rope.get(key) is not None}
    return result | {"rope_scaling": scaling}


def _listing(source: str, faults: list[str]) -> str:
    more = [f"… and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
    biases = any(fault.startswith("unexpected") and fault.endswith(".bias") for fault in faults)
    why = "; phi3 has no biases" if biases else ""
    return "\n".join([f"{source}: the weights do not fit ({len(faults)} differences{why}).", *faults[:_LISTED], *more])


def _fail(source: str, why: str) -> NoReturn:
    raise ConfigError(f"{source}: {why}")
