"""config.json: what each released model's file means, every spelling of it, and what is refused."""

import copy
import json
import math

import moe_models
import oracle
import pytest
import released
import small_models
from mlx.utils import tree_flatten

from phi3_mlx.errors import CheckpointError, ConfigError, Phi3Error
from phi3_mlx.models import build, check_layers, parse_config, read_config, shapes

LONG_128K = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}
MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
}
MEDIUM = {
    **MINI,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
PHI_4_MINI = {
    **MINI,
    **LONG_128K,
    "vocab_size": 200064,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "rope_scaling": released.PHI_4_MINI,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "mlp_bias": False,
    "lm_head_bias": False,
}
APRIL = {key: value for key, value in MINI.items() if key not in ("sliding_window", "tie_word_embeddings")}
# The keys of the released files that bear on the numbers, and what must come of them.
RELEASED = {
    "Phi-3-mini-4k-instruct": MINI,
    "Phi-3-mini-128k-instruct": {**MINI, **LONG_128K, "rope_scaling": released.MINI_128K_JUNE},
    "Phi-3-mini-128k-instruct.april-2024.partial": {
        **APRIL,
        "max_position_embeddings": 131072,
        "rope_scaling": released.MINI_128K_APRIL,
    },
    "Phi-3.5-mini-instruct": {**MINI, **LONG_128K, "rope_scaling": released.PHI_3_5_MINI},
    "Phi-3-medium-4k-instruct": MEDIUM,
    "phi-4": {
        **MEDIUM,
        "vocab_size": 100352,
        "rope_theta": 250000,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "sliding_window": None,
    },
    "Phi-4-mini-instruct": PHI_4_MINI,
    "Phi-4-mini-reasoning": {
        **PHI_4_MINI,
        "rope_scaling": {**released.PHI_4_MINI, "short_factor": released.PHI_4_MINI["long_factor"]},
    },
}
ATTENTION_FACTOR = 1.1902380714238083  # sqrt(1 + ln 32 / ln 4096)
#        head_dim, rotary dims, window, original, longest, attention factor, KV heads, tied, short[0], long[-1]
FACTS = {
    "Phi-3-mini-4k-instruct": (96, 96, 2047, 4096, 4096, None, 32, False, None, None),
    "Phi-3-mini-128k-instruct": (96, 96, 262144, 4096, 131072, ATTENTION_FACTOR, 32, False, 1.1, 64.76000213623047),
    "Phi-3-mini-128k-instruct.april-2024.partial": (
        *(96, 96, None, 4096, 131072, ATTENTION_FACTOR, 32, False, 1.05, 64.81001281738281),
    ),
    "Phi-3.5-mini-instruct": (96, 96, 262144, 4096, 131072, ATTENTION_FACTOR, 32, False, 1.0, 64.83999633789062),
    "Phi-3-medium-4k-instruct": (128, 128, 2047, 4096, 4096, None, 10, False, None, None),
    "phi-4": (128, 128, None, 16384, 16384, None, 10, False, None, None),
    "Phi-4-mini-instruct": (128, 96, 262144, 4096, 131072, ATTENTION_FACTOR, 8, True, 1.0, 47.77),
    "Phi-4-mini-reasoning": (128, 96, 262144, 4096, 131072, ATTENTION_FACTOR, 8, True, 1.0, 47.77),
}
LONG = RELEASED["Phi-3.5-mini-instruct"]


def facts(config) -> tuple:
    rope = config.longrope
    return (
        config.head_dim,
        config.rotary_dim,
        config.sliding_window,
        config.original_max_position_embeddings,
        config.max_position_embeddings,
        rope and rope.short_mscale,
        config.num_key_value_heads,
        config.tie_word_embeddings,
        rope and rope.short_factor[0],
        rope and rope.long_factor[-1],
    )


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def scaling(**changes) -> dict:
    """3.5-mini's rope_scaling with changes; a value of ... takes the key out."""
    merged = {**released.PHI_3_5_MINI, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


# The released models


@pytest.mark.parametrize("name", list(RELEASED))
def test_released_config(name):
    config = parse_config(RELEASED[name])
    assert facts(config) == FACTS[name]
    raw = RELEASED[name]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, key) == raw[key]
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == raw["rope_theta"]
    assert config.dtype == "bfloat16"
    assert config.quantization is None


@pytest.mark.parametrize("name", list(RELEASED))
def test_the_real_file_says_the_same(name, shared):
    path = shared / "configs" / f"{name}.json"
    raw = json.loads(path.read_text())
    real, kept = parse_config(raw), parse_config(RELEASED[name])
    assert facts(real) == FACTS[name]
    if "partial" in name:  # its source gives no dtype
        raw["torch_dtype"] = "bfloat16"
        real = parse_config(raw)
    assert real == kept


def test_pictures_are_refused_by_name(shared):
    raw = json.loads((shared / "configs" / "Phi-3-vision-128k-instruct.json").read_text())
    with pytest.raises(ConfigError, match=raw["model_type"]):
        parse_config(raw)


@pytest.mark.parametrize("name", ["Phi-3-small-8k-instruct", "Phi-3.5-MoE-instruct"])
def test_the_other_members_read_the_real_file(name, shared):
    raw = json.loads((shared / "configs" / f"{name}.json").read_text())
    config = parse_config(raw)
    assert config.model_type == raw["model_type"]
    assert config.hidden_size == raw["hidden_size"]
    assert config.max_position_embeddings == raw["max_position_embeddings"]


@pytest.mark.parametrize("name", list(RELEASED))
def test_transformers_reads_the_same_facts(name):
    transformers = pytest.importorskip("transformers")
    rope_functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    pytest.importorskip("torch")
    raw = copy.deepcopy(RELEASED[name])
    if (raw["rope_scaling"] or {}).get("type") == "su":
        raw["rope_scaling"]["type"] = "longrope"  # the name it had in April 2024; transformers 5.23 refuses it
    theirs, ours = transformers.Phi3Config.from_dict(raw), parse_config(RELEASED[name])
    assert theirs.sliding_window == ours.sliding_window
    assert theirs.tie_word_embeddings == ours.tie_word_embeddings
    assert theirs.original_max_position_embeddings == ours.original_max_position_embeddings
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    if ours.longrope is None:
        assert theirs.rope_parameters["rope_type"] == "default"
        return
    for length, factors in ((4096, ours.longrope.short_factor), (4097, ours.longrope.long_factor)):
        frequencies, attention_factor = rope_functions["longrope"](theirs, None, length)
        assert attention_factor == ours.longrope.short_mscale
        expected = [1 / (f * 10000 ** (2 * k / ours.rotary_dim)) for k, f in enumerate(factors)]
        assert frequencies.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["Phi-3-mini-4k-instruct", "Phi-3.5-mini-instruct", "Phi-4-mini-instruct"])
def test_what_transformers_writes_is_read_back(name, tmp_path):
    """transformers 5 writes `rope_parameters` and `dtype`; the file means what the old one meant."""
    transformers = pytest.importorskip("transformers")
    transformers.Phi3Config.from_dict(copy.deepcopy(RELEASED[name])).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in written
    assert facts(read_config(tmp_path)) == FACTS[name]
    assert read_config(tmp_path).rope_theta == 10000


# Spellings


BOTH_SPELLINGS = [
    {**LONG, "rope_parameters": scaling()},
    # As written so that transformers 4 and 5 and mlx-lm read it.
    {**LONG, "rope_parameters": scaling(type=..., rope_type="longrope", rope_theta=1e4, partial_rotary_factor=1.0,
                                        original_max_position_embeddings=4096, factor=32.0)},
    {**LONG, "rope_scaling": scaling(rope_theta=1e4), "rope_parameters": scaling(type="su", rope_type="longrope")},
    {**LONG, "rope_scaling": scaling(type="yarn"), "rope_parameters": scaling(attention_factor=ATTENTION_FACTOR)},
]  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [
        {**LONG, "rope_scaling": scaling(type="su")},
        {**LONG, "rope_scaling": scaling(type="yarn")},
        {**LONG, "rope_scaling": scaling(type=..., rope_type="longrope")},
        {**LONG, "rope_scaling": scaling(type=..., rope_type="su")},
        {**LONG, "rope_scaling": scaling(type="su", rope_type="longrope")},
        {**without(LONG, "rope_scaling"), "rope_parameters": scaling(type=..., rope_type="longrope")},
        {**without(LONG, "rope_scaling", "rope_theta"), "rope_parameters": scaling(rope_theta=10000.0)},
        {**LONG, "rope_parameters": None},
        {**LONG, "rope_scaling": None, "rope_parameters": scaling()},
        {**LONG, "rope_scaling": {}, "rope_parameters": scaling()},
        {**LONG, "rope_parameters": {}},
        *BOTH_SPELLINGS,
        {**LONG, "layer_types": ["full_attention"] * 32},  # nothing is outside its window
        {**LONG, "layer_types": ["sliding_attention"] * 32},
        {**LONG, "rope_scaling": scaling(original_max_position_embeddings=8192)},  # the top-level one wins
        {**without(LONG, "original_max_position_embeddings"), "rope_scaling": scaling()},  # 4096 is the default
        {
            **without(LONG, "original_max_position_embeddings"),
            "rope_scaling": scaling(original_max_position_embeddings=4096),
        },
        {**LONG, "rope_scaling": scaling(factor=32.0)},
        {**LONG, "rope_scaling": scaling(attention_factor=ATTENTION_FACTOR)},
        {**LONG, "partial_rotary_factor": 1.0},
        {**LONG, "head_dim": 96},
        {**LONG, "head_dim": None, "mlp_bias": None, "layer_types": None},
        {**without(LONG, "rope_theta", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings")},
        {**without(LONG, "torch_dtype"), "dtype": "bfloat16"},
        {**LONG, "num_hidden_layers": 32.0, "rope_theta": 10000},
        {**LONG, "hidden_act": "swish"},
    ],
)
def test_spellings_of_the_same_model(raw):
    assert parse_config(raw) == parse_config(LONG)


@pytest.mark.parametrize("raw", BOTH_SPELLINGS)
def test_transformers_means_the_same_by_two_spellings(raw):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Phi3Config.from_dict(copy.deepcopy(raw)).rope_parameters
    ours = parse_config(raw)
    assert theirs["rope_type"] == "longrope"
    assert theirs["rope_theta"] == ours.rope_theta
    assert tuple(theirs["short_factor"]) == ours.longrope.short_factor
    assert tuple(theirs["long_factor"]) == ours.longrope.long_factor


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"short_factor": [1.5] * 48}, "longrope"),
        ({"attention_factor": 1.0}, "longrope"),
        ({"factor": 8.0}, "longrope"),
        ({"partial_rotary_factor": 0.5, "short_factor": [1.0] * 24, "long_factor": [1.0] * 24}, "rotary_dim"),
    ],
)
def test_two_spellings_of_other_ropes_are_refused(change, differs):
    for old, new in ((scaling(), scaling(**change)), (scaling(**change), scaling())):
        with pytest.raises(ConfigError, match=rf"rope_scaling and rope_parameters are both given.* {differs}"):
            parse_config({**LONG, "rope_scaling": old, "rope_parameters": new})


@pytest.mark.parametrize(
    ("raw", "fits"),
    [
        ({"sliding_window": None, "layer_types": ["full_attention"] * 32}, True),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 32}, True),
        ({"sliding_window": 2047, "layer_types": ["sliding_attention"] * 32}, True),
        ({"sliding_window": 2047, "layer_types": ["full_attention"] * 32}, False),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 32}, False),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 31}, False),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 31 + ["chunked_attention"]}, False),
        ({"sliding_window": None, "layer_types": [["full_attention"]] * 32}, False),
        ({"sliding_window": None, "layer_types": "full_attention"}, False),
        ({"sliding_window": None, "layer_types": []}, False),
    ],
)
def test_layer_types_say_what_the_window_says(raw, fits):
    if fits:
        assert parse_config({**MINI, **raw}) == parse_config({**MINI, **raw, "layer_types": None})
    else:
        with pytest.raises(ConfigError, match="layer_types"):
            parse_config({**MINI, **raw})


@pytest.mark.parametrize("beside", [{"group_size": 32, "bits": 4}, {"group_size": 64, "bits": 4, "mode": "affine"}, {}])
@pytest.mark.parametrize("quantization", [{"group_size": 32, "bits": 4, "mode": "affine"}, None])
def test_mlxs_repetition_of_quantization_is_not_read(quantization, beside):
    raw = {**MINI, "quantization": quantization}
    assert parse_config({**raw, "quantization_config": beside}) == parse_config(raw)


def test_values_inside_the_rope_object_win():
    raw = {**LONG, "rope_scaling": scaling(rope_theta=5e5), "rope_theta": 1e4}
    assert parse_config(raw).rope_theta == 5e5
    inside = {**without(PHI_4_MINI, "partial_rotary_factor", "rope_scaling")}
    inside["rope_parameters"] = {**released.PHI_4_MINI, "partial_rotary_factor": 0.75, "rope_theta": 1e4}
    assert parse_config(inside) == parse_config(PHI_4_MINI)


@pytest.mark.parametrize(
    "rope", [None, {}, {"rope_type": "default", "rope_theta": 10000.0}, {"type": "default"}, {"rope_theta": 10000.0}]
)
def test_plain_rope(rope):
    assert parse_config({**without(MINI, "rope_scaling"), "rope_parameters": rope}) == parse_config(MINI)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1.5, "factor": 8.0}, 1.5),
        ({"factor": 8.0}, math.sqrt(1 + math.log(8) / math.log(4096))),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": None}, ATTENTION_FACTOR),
    ],
)
def test_attention_factor(changes, expected):
    assert parse_config({**LONG, "rope_scaling": scaling(**changes)}).longrope.short_mscale == expected


def test_attention_factor_is_one_without_an_extension():
    raw = {**LONG, "max_position_embeddings": 4096}
    assert parse_config(raw).longrope.short_mscale == 1.0


def test_mlx_quantization_is_kept_and_may_be_repeated():
    quantization = {"group_size": 64, "bits": 4, "lm_head": {"bits": 8, "group_size": 64}}
    raw = {**LONG, "quantization": quantization, "quantization_config": copy.deepcopy(quantization)}
    assert parse_config(raw).quantization == quantization


def test_the_input_is_left_alone():
    raw = copy.deepcopy(LONG)
    parse_config(raw)
    assert raw == LONG


def test_the_config_is_frozen():
    config = parse_config(MINI)
    with pytest.raises(AttributeError):
        config.vocab_size = 1


def test_head_dim_of_its_own_shapes_the_model():
    """head_dim need not be hidden_size / num_attention_heads."""
    raw = {**MINI, "hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    raw |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16}
    attention = build(parse_config(raw)).layers[0].self_attn
    assert attention.qkv_proj.weight.shape == ((3 + 2) * 32, 100)
    assert attention.o_proj.weight.shape == (100, 3 * 32)


# Refusals: (what is changed, what the message must name)

SHORT = released.PHI_3_5_MINI["short_factor"]
REFUSED = {
    "short list one short": ({"rope_scaling": scaling(short_factor=SHORT[:-1])}, "short_factor has 47 .* 48"),
    "long list one long": ({"rope_scaling": scaling(long_factor=[*SHORT, 1.0])}, "long_factor has 49 .* 48"),
    "lists of a whole head, part rotated": ({"partial_rotary_factor": 0.5}, "short_factor has 48 .* 24"),
    "no short list": ({"rope_scaling": scaling(short_factor=...)}, "short_factor"),
    "no long list": ({"rope_scaling": scaling(long_factor=...)}, "long_factor"),
    "a list that is a number": ({"rope_scaling": scaling(long_factor=2.0)}, "long_factor"),
    "a string among the factors": ({"rope_scaling": scaling(long_factor=[*SHORT[:-1], "1"])}, "long_factor"),
    "NaN among the factors": ({"rope_scaling": scaling(long_factor=[math.nan, *SHORT[1:]])}, r"long_factor\[0\]"),
    "a zero factor": ({"rope_scaling": scaling(short_factor=[0, *SHORT[1:]])}, r"short_factor\[0\]"),
    "a negative factor": ({"rope_scaling": scaling(short_factor=[-1.0, *SHORT[1:]])}, r"short_factor\[0\]"),
    "null among the factors": ({"rope_scaling": scaling(short_factor=[None, *SHORT[1:]])}, r"short_factor\[0\]"),
    "yarn without lists": ({"rope_scaling": {"type": "yarn", "factor": 32.0}}, "short_factor"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    "two types that differ": ({"rope_scaling": scaling(rope_type="default")}, "default"),
    "a type that is a list": ({"rope_scaling": scaling(type=["longrope"])}, "rope"),
    "lists without a type": ({"rope_scaling": scaling(type=...)}, "type"),
    "a long list alone": ({"rope_scaling": scaling(type=..., short_factor=...)}, "rope"),
    "a factor without a type": ({"rope_scaling": {"factor": 2.0}}, "rope"),
    "rope_scaling that is text": ({"rope_scaling": "longrope"}, "rope_scaling"),
    "rope_scaling that is a list": ({"rope_scaling": [1.0]}, "rope_scaling"),
    "rope_scaling that is an empty list": ({"rope_scaling": []}, "rope_scaling"),
    "rope_scaling that is false": ({"rope_scaling": False}, "rope_scaling"),
    "rope parameters a layer type": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope_parameters",
    ),
    "two rope objects that differ": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_"),
    "factor NaN": ({"rope_scaling": scaling(factor=math.nan)}, "factor"),
    "attention_factor 0": ({"rope_scaling": scaling(attention_factor=0)}, "attention_factor"),
    "attention_factor text": ({"rope_scaling": scaling(attention_factor="1.19")}, "attention_factor"),
    "original past the longest": ({"original_max_position_embeddings": 262144}, "original_max_position_embeddings"),
    "original 1": ({"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    "original 0": ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    "original 0 inside": (
        {
            "original_max_position_embeddings": None,
            "rope_scaling": scaling(original_max_position_embeddings=0),
        },
        "original_max_position_embeddings",
    ),
    "model_type of another mixture": ({"model_type": "phixtral"}, "phixtral"),
    "model_type of a stranger": ({"model_type": "llama"}, "llama"),
    "no model_type": ({"model_type": None}, "model_type"),
    "model_type that is a list": ({"model_type": ["phi3"]}, "model_type"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "lm_head bias": ({"lm_head_bias": True}, "lm_head_bias"),
    "original inside alone": (
        {"original_max_position_embeddings": None, "rope_scaling": scaling(original_max_position_embeddings=2048)},
        "original_max_position_embeddings 2048 is given in rope_scaling alone",
    ),
    "weights of another name": ({"transformers_weights": "consolidated.safetensors"}, "transformers_weights"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    "GPTQ beside MLX": (
        {"quantization_config": {"quant_method": "gptq"}, "quantization": {"bits": 4, "group_size": 64}},
        "quantization_config",
    ),
    "quantization that is a number": ({"quantization": 4}, "quantization"),
    "heads that do not divide": ({"num_key_value_heads": 5}, "num_attention_heads .*num_key_value_heads"),
    "more KV heads than heads": ({"num_key_value_heads": 64}, "num_key_value_heads"),
    "hidden that does not divide": ({"hidden_size": 3071}, "hidden_size"),
    "odd rotary dims": ({"partial_rotary_factor": 0.99}, "partial_rotary_factor"),
    "no rotary dims": ({"partial_rotary_factor": 0.001}, "partial_rotary_factor"),
    "more rotary dims than a head": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    "negative rotary": ({"partial_rotary_factor": -0.5}, "partial_rotary_factor"),
    "rotary text": ({"partial_rotary_factor": "0.75"}, "partial_rotary_factor"),
    "theta NaN": ({"rope_theta": math.nan}, "rope_theta"),
    "theta infinite": ({"rope_theta": math.inf}, "rope_theta"),
    "theta text": ({"rope_theta": "10000"}, "rope_theta"),
    "theta 0": ({"rope_theta": 0}, "rope_theta"),
    "theta inside is text": ({"rope_scaling": scaling(rope_theta="1e4")}, "rope_theta"),
    "eps negative": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "layers 0": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "layers negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "vocabulary beyond a float": ({"vocab_size": 10**400}, "vocab_size"),
    "vocabulary text": ({"vocab_size": "32064"}, "vocab_size"),
    "window 0": ({"sliding_window": 0}, "sliding_window"),
    "window negative": ({"sliding_window": -2047}, "sliding_window"),
    "window text": ({"sliding_window": "2047"}, "sliding_window"),
    "window true": ({"sliding_window": True}, "sliding_window"),
    "tie text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "tie 1": ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    "dtype number": ({"torch_dtype": 16}, "dtype"),
}
REQUIRED = [
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings"),
]


@pytest.mark.parametrize(("changes", "names"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused(changes, names):
    with pytest.raises(ConfigError, match=names) as caught:
        parse_config({**LONG, **changes}, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        parse_config(without(MINI, key))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b'"phi3"', b"\xff\xfe", b"{'model_type': 'phi3'}", b"\xef\xbb\xbf{}"),
        *(b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_holds_no_object_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Phi3Error) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_good_file_is_read_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LONG), encoding="utf-8")
    assert read_config(tmp_path) == parse_config(LONG)
    path.write_text(json.dumps({**LONG, "rope_theta": math.nan}), encoding="utf-8")  # json writes NaN bare
    with pytest.raises(ConfigError, match="rope_theta") as caught:
        read_config(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("huge", [10**8, 10**9, 10**17])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"]
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(key, huge):
    with pytest.raises(ConfigError, match=rf"config\.json: {key} is {huge}, which no model has; expected at most"):
        parse_config({**MINI, key: huge})


def test_all_heads_together_have_a_bound_too():
    with pytest.raises(ConfigError, match=r"num_attention_heads 100000 of head_dim 1000 are 100,000,000 numbers"):
        parse_config({**MINI, "num_attention_heads": 10**5, "num_key_value_heads": 1, "head_dim": 1000})


@pytest.mark.parametrize("key", ["max_position_embeddings", "sliding_window"])
def test_lengths_fit_what_mlx_counts_in(key):
    with pytest.raises(ConfigError, match="expected at most 2,147,483,647"):
        parse_config({**MINI, key: 2**31})


@pytest.mark.parametrize(
    "raw", [oracle.CONFIGS["mini-4k"], oracle.CONFIGS["phi-4-mini"], moe_models.RAW, small_models.RAW]
)
@pytest.mark.parametrize("layers", [1, 2, 11])
def test_shapes_are_those_of_the_models_modules(raw, layers):
    config = parse_config({**raw, "num_hidden_layers": layers})
    made = {name: array.shape for name, array in tree_flatten(build(config).parameters())}
    assert list(shapes(config).items()) == list(made.items())


def test_more_layers_than_tensors_are_refused_before_anything_is_made():
    config = parse_config({**MINI, "num_hidden_layers": 9999})
    names = [name for name in shapes(parse_config({**MINI, "num_hidden_layers": 3})) if ".mlp." not in name]
    with pytest.raises(CheckpointError, match=r"there: config\.json says num_hidden_layers 9,999, .* have 3 layers"):
        check_layers(config, names, "there")
