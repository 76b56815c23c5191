"""config.json -> a frozen, validated config. Field names and meanings are Hugging Face's.

What all members of the family share is here; `models` has each member's own, and reads a file into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import files
from .errors import CheckpointError, ConfigError, Phi3Error
from .fields import kind_of, shorten

# transformers 5 writes `rope_parameters` with theta and friends inside, older files `rope_scaling`.
ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Arrays of a token that are alive in a decoder layer at once, fitted to the peaks of tests/test_plan.py on a CPU
# (bench/LOG.md, "One kernel at a time"): hidden states, and queries, keys and values side by side.
_HIDDEN_ARRAYS, _QKV_ARRAYS = 7, 3
_MOST_OF_ALL = 2**31 - 1  # MLX counts in 32 bits
# Ten times and more what any model has: what is made before the weights are looked at stays small.
_MOST = {"num_hidden_layers": 10_000, "vocab_size": 2**24, "num_local_experts": 1024} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "ff_intermediate_size", "num_attention_heads", "head_dim"), 2**20
)


@dataclass(frozen=True)
class LongRope:
    """LongRoPE's two factor lists and attention factors (arXiv 2402.13753; transformers `longrope`).

    `short_factor` and `long_factor` have one entry a rotated pair (rotary dims / 2); `short_mscale` and `long_mscale`
    multiply cos and sin in their regimes (transformers' one `attention_factor` is both).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    short_mscale: float
    long_mscale: float


@dataclass(frozen=True)
class Cut:
    """Rows `first` to `last` (past the last), of `rows` along the last axis but one, of a stored tensor."""

    name: str
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class BlockPattern:
    """Which keys a head of a block-sparse layer sees (arXiv 2404.14219, section 2).

    Blocks of `block_size` keys are counted from the sequence's first token. A query sees the `local_blocks` that end
    with its own, and of the older ones every `stride`-th. `head_step` is how far a head's lie before its predecessor's.
    """

    block_size: int
    local_blocks: int
    stride: int
    head_step: int

    @property
    def reach(self) -> int:
        """The longest sequence of which every token sees all before it."""
        return self.block_size * self.local_blocks

    def residue(self, head: int) -> int:
        """Which of `stride` blocks the head sees however old they are."""
        return -(head * self.head_step + 1) % self.stride

    def oldest_local(self, position: int) -> int:
        """The first local block of the query at `position`."""
        return max(0, position // self.block_size - self.local_blocks + 1)


@dataclass(frozen=True)
class Config:
    """What every member of the family has, whatever its architecture; each member's own config adds to it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    longrope: LongRope | None
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str | None
    quantization: Mapping[str, Any] | None

    @property
    def linears(self) -> Mapping[str, tuple[int, ...]]:
        """The linear layers of a decoder layer, by their path in it, in the order of use.

        (outputs, inputs), or (experts, outputs, inputs) of a layer that is an array of matrices.
        """
        raise NotImplementedError

    @property
    def adaptable(self) -> Mapping[str, tuple[int, int]]:
        """Those of `linears` that an adapter may change: (outputs, inputs)."""
        return {path: (shape[0], shape[1]) for path, shape in self.linears.items() if len(shape) == 2}

    @property
    def delicate(self) -> tuple[str, ...]:
        """Those of `linears` that stay in floats unless a recipe names them."""
        return ()

    @property
    def parts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By the name of each fused linear layer, the layers it is made of and their rows, (first, past the last)."""
        return {}

    def made_of(self, name: str) -> tuple[str, ...]:
        """What a checkpoint may hold in the place of the tensor `name`.

        A matrix: the rows of these one after the other; an array of matrices: these, one each.
        """
        return (name,)

    def cut_from(self, name: str) -> Cut | None:
        """The tensor that other software stores in the place of the tensor `name`, with more in it or renamed."""
        return None

    def is_unused(self, name: str) -> bool:
        """Whether a tensor is a leftover that the reference does not use."""
        return name.endswith(".rotary_emb.inv_freq") or (self.tie_word_embeddings and name == "lm_head.weight")

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def router(self) -> str | None:
        """The path of the linear layer in a decoder layer that chooses each token's experts, if there is one."""
        return None

    @property
    def sparse_layers(self) -> BlockPattern | None:
        """What the layers see that are not dense, if there are any."""
        return None

    def is_dense(self, layer: int) -> bool:
        """Whether every query of that decoder layer may see all keys before it, or all in its window."""
        return True

    @property
    def largest_linear(self) -> int:
        """Numbers of the largest matrix of a decoder layer."""
        return max(shape[-2] * shape[-1] for shape in self.linears.values())

    @property
    def experts_per_token(self) -> int:
        """How many feed-forward networks a token goes through in a layer."""
        return 1

    @property
    def numbers_in_work(self) -> int:
        """Numbers of a token that are alive in a decoder layer at its peak, three terms."""
        return _HIDDEN_ARRAYS * self.hidden_size + self.mixing_in_work + self.inner_in_work

    @property
    def qkv_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def mixing_in_work(self) -> int:
        """Of `numbers_in_work`, those of attention: queries, keys and values."""
        return _QKV_ARRAYS * self.qkv_width

    @property
    def inner_in_work(self) -> int:
        """Of `numbers_in_work`, those inside the feed-forward part: what training keeps, and a copy."""
        return (self.mlp_kept + 1) * self.mlp_width

    @property
    def mlp_kept(self) -> int:
        """How many arrays of `mlp_width` the backward pass needs of the feed-forward part."""
        return 3  # gate, up and their product

    @property
    def mlp_width(self) -> int:
        """Numbers that a token's activations have inside the feed-forward part, of each of its projections."""
        return self.experts_per_token * self.intermediate_size


def read_json(
    path: Path, error: type[Phi3Error] = CheckpointError, way_out: str = "download the file again"
) -> dict[str, Any]:
    """The JSON object in `path`; `error`, which ends with `way_out`, if it cannot be read or is not an object."""
    try:
        value = files.read_any_json(path)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}; {way_out}") from fault
    except ValueError as fault:  # no text, not JSON, beyond the limits
        raise error(f"{path} is not valid JSON ({fault}); {way_out}") from fault
    if not isinstance(value, dict):
        raise error(f"{path} holds {kind_of(value)}, not a JSON object; {way_out}")
    return value


class Reader:
    """Reads one config.json, naming the file and the key in whatever it refuses."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source
        # One of them at most has something in it: of two `models.parse_config` makes two readers.
        self.rope_key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        rope = next((raw[key] for key in ROPE_KEYS if raw.get(key)), raw.get("rope_scaling"))
        rope = {} if rope is None else rope
        if not isinstance(rope, Mapping):
            self.fail(f"{self.rope_key} is {shorten(rope)}, expected an object or null")
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
            self.fail(f"{key} is {shorten(value)}, expected a number")
        if value <= 0 or kind(value) != value:
            self.fail(f"{key} is {shorten(value)}, expected a positive {'integer' if kind is int else 'number'}")
        if kind is int and value > (most := _MOST.get(key, _MOST_OF_ALL)):
            self.fail(f"{key} is {value}, which no model has; expected at most {most:,}")
        return kind(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key) or False
        if not isinstance(value, bool):
            self.fail(f"{key} is {shorten(value)}, expected true or false")
        return value

    def refuse_unless(self, must_be: Mapping[str, tuple[Any, ...]]) -> None:
        """ConfigError for a key that is given and has none of the values that the member computes."""
        for key, allowed in must_be.items():
            value = self.raw.get(key)
            # Without a method it is MLX's repetition of `quantization`, which nobody reads, and which some tools leave
            # when they dequantize a model. Packed weights without `quantization` are refused when they are found.
            repeated = key == "quantization_config" and isinstance(value, Mapping) and "quant_method" not in value
            if value is not None and value not in allowed and not repeated:
                kind = self.raw["model_type"]
                self.fail(f"{key} {shorten(value)} is not supported for {kind}, so its outputs would be wrong")

    def head_dim(self) -> int:
        """Width of an attention head, once the numbers of heads agree."""
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        kv_heads = self.number("num_key_value_heads", heads)
        if heads % kv_heads:
            self.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if self.raw.get("head_dim") is None and hidden % heads:
            self.fail(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = self.number("head_dim", hidden // heads)
        if (both := heads * head_dim) > _MOST["vocab_size"]:
            self.fail(f"num_attention_heads {heads} of head_dim {head_dim} are {both:,} numbers, which no model has")
        return head_dim

    def rotary_dim(self) -> int:
        """Dims of a head that are rotated."""
        head_dim = self.head_dim()
        partial = self.rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        partial = self.number("partial_rotary_factor", 1.0, float, {"partial_rotary_factor": partial})
        rotary_dim = int(head_dim * partial)
        if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
            self.fail(f"partial_rotary_factor {partial} of head_dim {head_dim} gives {rotary_dim} rotated dims")
        return rotary_dim

    def original_length(self) -> int:
        """original_max_position_embeddings; the top-level one wins over that in rope_scaling, as in transformers."""
        longest = self.number("max_position_embeddings")
        inner = self.number("original_max_position_embeddings", min(longest, 4096), where=self.rope)
        original = self.number("original_max_position_embeddings", inner)
        if original > longest:
            self.fail(f"original_max_position_embeddings {original} exceeds max_position_embeddings {longest}")
        return original

    def shared(self, intermediate_size: str = "intermediate_size") -> dict[str, Any]:
        """The fields of `Config` but the rotation's, which members spell apart; takes the name of one key."""
        raw = self.raw
        quantization = raw.get("quantization")
        if quantization is not None and not isinstance(quantization, Mapping):
            self.fail(f"quantization is {shorten(quantization)}, expected an object")
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        if dtype is not None and not isinstance(dtype, str):
            self.fail(f"torch_dtype is {shorten(dtype)}, expected a name such as 'bfloat16'")
        named = raw.get("transformers_weights")
        if named not in (None, "model.safetensors", "model.safetensors.index.json"):
            self.fail(f"transformers_weights is {shorten(named)}; only files called model.safetensors are read")
        window = None if raw.get("sliding_window") is None else self.number("sliding_window")
        self._check_layer_types(window)
        heads = self.number("num_attention_heads")
        return {
            "model_type": raw["model_type"],
            "vocab_size": self.number("vocab_size"),
            "hidden_size": self.number("hidden_size"),
            "intermediate_size": self.number(intermediate_size),
            "num_hidden_layers": self.number("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("num_key_value_heads", heads),
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.number("max_position_embeddings"),
            "original_max_position_embeddings": self.original_length(),
            "sliding_window": window,
            "dtype": dtype,
            "quantization": quantization,
        }

    def _check_layer_types(self, window: int | None) -> None:
        """ConfigError unless `layer_types`, where it is given, says of every layer what the window says of all."""
        kinds, layers = self.raw.get("layer_types"), self.number("num_hidden_layers")
        if kinds is None:
            return
        allowed = ["full_attention"] if window is None else ["sliding_attention"]
        if window is not None and window >= self.number("max_position_embeddings"):
            allowed.append("full_attention")  # nothing is outside such a window
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
            self.fail(
                f"layer_types {shorten(kinds)} is not {allowed[0]} for each of the {layers} layers, as sliding_window "
                f"{'null' if window is None else window} says; set it to null if that is meant"
            )

    def rope_kind(self) -> str | None:
        """ "longrope", or None for plain rotation; ConfigError for any other."""
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
            named = " / ".join(shorten(kind) for kind in kinds.values())
            if len(spelled) == 2 and spelled[0] != spelled[1]:
                self.fail(f"{self.rope_key} has a type and a rope_type that differ, {named}; remove one of them")
            self.fail(f"rope type {named} is not supported; known: longrope")
        return "longrope"

    def longrope(self, rotary_dim: int, longest: int, original: int) -> LongRope | None:
        """The two factor lists; one attention factor for both regimes, as transformers' `longrope` has it."""
        if self.rope_kind() is None:
            return None
        if original == 1:
            self.fail("original_max_position_embeddings is 1, which leaves LongRoPE nothing to extend")
        factor = self.number("factor", longest / original, float, self.rope)
        automatic = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        attention_factor = self.number("attention_factor", automatic, float, self.rope)
        return LongRope(
            short_factor=self.factors("short_factor", rotary_dim // 2),
            long_factor=self.factors("long_factor", rotary_dim // 2),
            short_mscale=attention_factor,
            long_mscale=attention_factor,
        )

    def factors(self, key: str, length: int) -> tuple[float, ...]:
        values = self.rope.get(key)
        if not isinstance(values, list):
            self.fail(f"{self.rope_key}.{key} is {shorten(values)}, expected a list of {length} numbers")
        if len(values) != length:
            self.fail(f"{self.rope_key}.{key} has {len(values)} entries, expected {length} (half of the rotated dims)")
        return tuple(self.number(f"{key}[{i}]", kind=float, where={f"{key}[{i}]": v}) for i, v in enumerate(values))
