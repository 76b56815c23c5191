"""Llama's and Mistral's layout as Phi-3's: against transformers' own models of those kinds where it is installed."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
import released

from phi3_mlx.conversion.split import find_parts, phi3_config
from phi3_mlx.errors import CheckpointError, ConfigError
from phi3_mlx.models import build, parse_config, shapes
from phi3_mlx.store.safetensors import Tensor, find_weights

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.03 * i for i in range(8)],
    "long_factor": [1.0 + 0.9 * i for i in range(8)],
    "original_max_position_embeddings": 48,
}


def split_shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint in Llama's layout, written down without the code under test."""
    hidden, inner = raw["hidden_size"], raw["intermediate_size"]
    dim = raw.get("head_dim") or hidden // raw["num_attention_heads"]
    queries, keys = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    shapes = {
        "model.embed_tokens.weight": (raw["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (raw["vocab_size"], hidden),
    }
    for i in range(raw["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def tensors_of(shapes: dict) -> dict[str, Tensor]:
    return {name: Tensor("F32", shape, 4 * int(np.prod(shape))) for name, shape in shapes.items()}


def plan(raw: dict, tensors: dict[str, Tensor], source: str = "config.json"):
    """The config.json of the result, and what each of its tensors is made of."""
    config = phi3_config(raw, source)
    return config, find_parts(parse_config(config, source), tensors, source)


def converted(directory: Path):
    """Our model of a directory in another layout, filled by what `plan` says."""
    raw = json.loads((directory / "config.json").read_text())
    config, sources = plan(raw, find_weights(directory).tensors)
    stored = {}
    for file in find_weights(directory).files:
        stored |= mx.load(str(file))
    model = build(parse_config(config))
    model.load_weights([(name, mx.concatenate([stored[part] for part in parts])) for name, parts in sources.items()])
    return model


# ------------------------------------------------------------------------------- against transformers


CASES = {
    "llama": LLAMA,
    "llama-all-heads": {**LLAMA, "num_key_value_heads": 4},
    "llama-head-dim": {**LLAMA, "head_dim": 24},
    "llama-longrope": {**LLAMA, "rope_scaling": LONGROPE},
    "llama-longrope-factor": {**LLAMA, "rope_scaling": {**LONGROPE, "factor": 32.0}},
    "llama-attention-factor": {**LLAMA, "rope_scaling": {**LONGROPE, "attention_factor": 1.3}},
    "mistral": MISTRAL,
    "mistral-window": {**MISTRAL, "sliding_window": oracle.WINDOW},
    "mistral-tied": {**MISTRAL, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_sources_own(tmp_path: Path, case: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(CASES[case])))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.25)
    theirs.save_pretrained(tmp_path)
    ours = converted(tmp_path)
    for length in (12, 48, 49, 80):  # around the original length of LongRoPE, and beyond the window
        ids = oracle.ids_of(length, rows=2, seed=length)
        expected = oracle.torch_logits(theirs, ids)
        np.testing.assert_allclose(np.array(ours(mx.array(ids))), expected, atol=2e-5 * np.abs(expected).max())


def test_what_transformers_assumes_where_keys_are_missing():
    transformers = pytest.importorskip("transformers")
    keys = ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "rope_theta")
    for kind in ("llama", "mistral"):
        raw = {key: value for key, value in LLAMA.items() if key not in keys}
        raw |= {"model_type": kind, "num_attention_heads": 16}
        theirs = transformers.AutoConfig.for_model(**raw)
        ours = parse_config(phi3_config(raw))
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.num_key_value_heads == theirs.num_key_value_heads == {"llama": 16, "mistral": 8}[kind]
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        nulls = parse_config(phi3_config({**raw, "sliding_window": None, "num_key_value_heads": None}))
        assert (nulls.sliding_window, nulls.num_key_value_heads) == (None, 16)


# ------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("case", ["mini-4k", "medium-4k", "phi-4-mini", "3.5-mini"])
def test_the_order_and_the_shapes_are_the_models(case: str):
    config = parse_config(oracle.CONFIGS[case])
    found = shapes(config)
    first = [name for name in found if ".layers." not in name]
    assert first == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"][: len(first)]
    layers = [int(name.split(".")[2]) for name in found if ".layers." in name]
    assert layers == sorted(layers)
    assert next(iter(found)) == "model.embed_tokens.weight"


def test_queries_come_before_keys_before_values_and_gate_before_up():
    _, sources = plan(LLAMA, tensors_of(split_shapes(LLAMA)))
    layer = "model.layers.1"
    assert sources[f"{layer}.self_attn.qkv_proj.weight"] == tuple(
        f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"
    )
    assert sources[f"{layer}.mlp.gate_up_proj.weight"] == (
        f"{layer}.mlp.gate_proj.weight",
        f"{layer}.mlp.up_proj.weight",
    )
    assert sources[f"{layer}.mlp.down_proj.weight"] == (f"{layer}.mlp.down_proj.weight",)


def test_phi3_keeps_its_config_and_its_fused_tensors():
    raw = {**oracle.CONFIGS["3.5-mini"], "unknown": 1}
    fused = shapes(parse_config(raw))
    config, sources = plan(raw, tensors_of(fused))
    assert config == raw
    assert sources == {name: (name,) for name in fused}


def test_phi3_with_split_projections():
    raw = {**LLAMA, "model_type": "phi3"}
    config, sources = plan(raw, tensors_of(split_shapes(raw)))
    assert config == raw
    assert len(sources["model.layers.0.self_attn.qkv_proj.weight"]) == 3


def test_leftovers_that_the_reference_ignores_are_ignored():
    raw = {**LLAMA, "tie_word_embeddings": True}
    stored = {**split_shapes(raw), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    _, sources = plan(raw, tensors_of(stored))
    assert "lm_head.weight" not in sources


# A re-publication of Phi-3-mini-4k in Mistral's layout, and one of Phi-3.5-mini in Llama's.
def test_phi3_mini_in_mistrals_layout():
    raw = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 2048,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32009,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "unsloth_version": "2024.9",
    }
    config = phi3_config(raw)
    parsed = parse_config(config)
    assert (parsed.sliding_window, parsed.rotary_dim, parsed.longrope) == (2048, 96, None)
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (1, 32000, "bfloat16")
    assert "unsloth_version" not in config


def test_phi3_5_mini_in_llamas_layout():
    raw = {
        **LLAMA,
        "hidden_size": 192,
        "num_attention_heads": 2,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "rope_scaling": released.PHI_3_5_MINI,
    }
    parsed = parse_config(phi3_config(raw))
    same = parse_config({**raw, "model_type": "phi3"})
    assert parsed.longrope == same.longrope
    assert parsed.longrope.short_mscale == pytest.approx(1.1902380714238083)
    assert (parsed.original_max_position_embeddings, parsed.sliding_window) == (4096, None)


def test_without_an_original_length_the_longest_counts():
    scaling = {**LONGROPE, "original_max_position_embeddings": None}
    assert parse_config(phi3_config({**LLAMA, "rope_scaling": scaling})).original_max_position_embeddings == 512


# ------------------------------------------------------------------------------------------ refusals


REFUSED = {
    "model_type 'qwen2' is not supported; phi3, llama and mistral": {"model_type": "qwen2"},
    "model_type ['llama'] is not supported": {"model_type": ["llama"]},
    "attention_bias True": {"attention_bias": True},
    "mlp_bias True": {"mlp_bias": True},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor 0.75": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "num_local_experts 8": {"num_local_experts": 8},
    "rope type 'llama3' is not supported for phi3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope type 'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope type 'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope type ['longrope'] is not supported": {"rope_scaling": {**LONGROPE, "type": ["longrope"]}},
    "rope type 'default' / {} is not supported": {"rope_parameters": {"type": "default", "rope_type": {}}},
    # Phi-3's configs mean LongRoPE by it; Llama's mean YaRN.
    "rope type 'yarn'": {"rope_scaling": {**LONGROPE, "type": "yarn"}},
    "rope_parameters and rope_scaling are both given": {
        "rope_scaling": LONGROPE,
        "rope_parameters": {"rope_theta": 1},
    },
    "rope_scaling is 'none'": {"rope_scaling": "none"},
    "rope_scaling.short_factor is None": {"rope_scaling": {**LONGROPE, "short_factor": None}},
    "sliding_window 128 is given, but a llama model has none": {"sliding_window": 128},
    "are not all full_attention": {"layer_types": ["full_attention", "sliding_attention"]},
    "layer_types [['full_attention']] are not all": {"layer_types": [["full_attention"]]},
    "hidden_size is missing": {"hidden_size": None},
    "num_attention_heads 4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "quantization_config {'quant_method': 'gptq'} is not supported": {"quantization_config": {"quant_method": "gptq"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_phi3_cannot_compute_is_refused_by_name(message: str):
    with pytest.raises(ConfigError) as caught:
        plan({**LLAMA, **REFUSED[message]}, {}, "there/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("there/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"model.layers.0.self_attn.q_proj.bias": (64,)}, "1 differences; phi3 has no biases"),
    ({"model.layers.0.self_attn.q_norm.weight": (16,)}, "unexpected model.layers.0.self_attn.q_norm.weight"),
    ({"model.layers.1.mlp.up_proj.weight": None}, "missing model.layers.1.mlp.up_proj.weight"),
    ({"lm_head.weight": None}, "missing lm_head.weight"),
    # Another number of heads than the config says: the rows would be cut in the wrong places.
    ({"model.layers.1.self_attn.k_proj.weight": (64, 64)}, "k_proj.weight: shape (64, 64), expected (32, 64)"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(change: dict, message: str):
    shapes = {**split_shapes(LLAMA), **change}
    with pytest.raises(CheckpointError) as caught:
        plan(LLAMA, tensors_of({name: shape for name, shape in shapes.items() if shape is not None}), "there")
    assert message in str(caught.value)


def test_the_same_rope_in_two_spellings_is_one():
    new = {"rope_type": "longrope", **{key: value for key, value in LONGROPE.items() if key != "type"}}
    both = {**LLAMA, "rope_scaling": LONGROPE, "rope_parameters": {**new, "rope_theta": LLAMA["rope_theta"]}}
    assert phi3_config(both) == phi3_config({**LLAMA, "rope_scaling": LONGROPE})


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(CheckpointError) as caught:
        plan({**LLAMA, "num_hidden_layers": 15}, tensors_of(split_shapes(LLAMA)))
    assert len(str(caught.value).splitlines()) == 22
    assert "more" in str(caught.value).splitlines()[-1]
