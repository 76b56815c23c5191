"""Pairs of the same small model: transformers' Phi3ForCausalLM and ours. The reference of every parity test."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import naive
import numpy as np
import released
from mlx.utils import tree_flatten

from phi3_mlx.models import build, parse_config
from phi3_mlx.store.safetensors import INDEX

ORIGINAL = 48  # original length of the scaled-down LongRoPE models
WINDOW = 21

BASE = {
    "model_type": "phi3",
    "vocab_size": 160,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LONG = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": ORIGINAL * 32}

# Head shapes, factor lists, ties and thetas are the released models'; widths, lengths and windows are scaled down.
CONFIGS = {
    "mini-4k": {**BASE, "sliding_window": WINDOW},
    "mini-128k-april": {**BASE, **LONG, "rope_scaling": released.MINI_128K_APRIL},
    "mini-128k-june": {**BASE, **LONG, "rope_scaling": released.MINI_128K_JUNE},
    "3.5-mini": {**BASE, **LONG, "rope_scaling": released.PHI_3_5_MINI},
    "medium-4k": {
        **BASE,
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": WINDOW,
    },
    "phi-4": {**BASE, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 250000},
    "phi-4-mini": {
        **BASE,
        **LONG,
        "hidden_size": 384,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "rope_scaling": released.PHI_4_MINI,
    },
    # No released model has both; the rules must not care.
    "long-and-window": {**BASE, **LONG, "rope_scaling": released.PHI_3_5_MINI, "sliding_window": WINDOW},
}


def slim(raw: dict, layers: int = 2) -> dict:
    """The same head shape, RoPE and window in a model small enough for hundreds of calls: one KV head."""
    dim, heads = raw["hidden_size"] // raw["num_attention_heads"], 1 if raw["num_key_value_heads"] > 1 else 2
    return {
        **raw,
        "hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
        "vocab_size": 96,
    }


def ids_of(length: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    """Random token ids (rows, length), none of them the padding id 0."""
    return np.random.default_rng(seed).integers(2, 96, (rows, length)).astype(np.int32)


def make_ours(raw: dict, seed: int = 0):
    """Our model with random weights of a spread that makes every position matter."""
    model = build(parse_config(raw))
    rng = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * rng.standard_normal(array.shape)
        else:
            spread = (
                (0.12 if raw["tie_word_embeddings"] else 1.0) if "embed" in name else 1.2 / np.sqrt(array.shape[-1])
            )
            values = rng.standard_normal(array.shape) * spread
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights)
    return model


def write_weights(directory: Path, weights: dict[str, mx.array], shards: int = 1) -> None:
    """The weight files of a model directory, and the index of several; written without the code under test."""
    names, weight_map = list(weights), {}
    for i in range(shards):
        file_name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(directory / file_name), {name: weights[name] for name in names[i::shards]})
        weight_map.update(dict.fromkeys(names[i::shards], file_name))
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def make_torch(raw: dict, model):
    """transformers' model with the weights of ours, float32, eager attention on the CPU."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_num_threads(1)  # more threads than free cores cost these small models a factor of ten
    raw = json.loads(json.dumps(raw))
    if (raw["rope_scaling"] or {}).get("type") == "su":
        raw["rope_scaling"]["type"] = "longrope"  # transformers 5.23 refuses "su", the same thing's first name
    config = Phi3Config.from_dict(raw)
    theirs = Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    weights = {name: torch.tensor(np.array(array)) for name, array in tree_flatten(model.parameters())}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


def make_torch_dequantized(directory: Path, model):
    """transformers' model with the weights of ours, which came from `directory` and are packed, as float32."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_num_threads(1)
    raw = json.loads((directory / "config.json").read_text())
    for key in ("quantization", "quantization_config", "torch_dtype"):  # in bfloat16 it would round our weights
        del raw[key]
    theirs = Phi3ForCausalLM._from_config(Phi3Config.from_dict(raw), attn_implementation="eager").eval()
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            dequantized = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            weights[f"{name}.weight"] = torch.tensor(np.array(dequantized.astype(mx.float32)))
    for name, array in tree_flatten(model.parameters()):
        if name.endswith("norm.weight"):
            weights[name] = torch.tensor(np.array(array.astype(mx.float32)))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.float()


def torch_logits(theirs, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(ids.astype(np.int64)), use_cache=False).logits.numpy()


def torch_generate(theirs, ids: np.ndarray, steps: int) -> list[int]:
    """The `steps` tokens transformers' greedy `generate()` puts after `ids` (L,); it never stops early."""
    import torch

    prompt = torch.tensor(ids.astype(np.int64))[None]
    options = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()


def every_step(raw: dict, whole_pass, ids: np.ndarray) -> np.ndarray:
    """Logits (L, V): row t is the last row of a pass over the first t + 1 of `ids` (L,).

    Attention is causal, so two passes hold them all: one over what is short, one over everything.
    """
    original = raw["original_max_position_embeddings"]
    if raw["rope_scaling"] is None or len(ids) <= original:
        return whole_pass(ids)
    return np.concatenate([whole_pass(ids[:original]), whole_pass(ids)[original:]])


def reference_steps(raw: dict, model, ids: np.ndarray) -> np.ndarray:
    """`every_step` by transformers, or by the float64 oracle where torch or transformers is missing."""
    try:
        theirs = make_torch(raw, model)
    except ImportError:
        weights = naive.weights_of(model)
        return every_step(raw, lambda part: naive.logits(raw, weights, part), ids)
    return every_step(raw, lambda part: torch_logits(theirs, part[None])[0], ids)


def last_logits(model, ids: np.ndarray, cache=None) -> np.ndarray:
    """Our logits (B, V) at the last position of `ids` (B, L)."""
    return np.array(model.logits(model.model(mx.array(ids), cache)[:, -1]))


def generate(model, ids: np.ndarray, steps: int, chunk: int = 0, **cache_options) -> list[int]:
    """The `steps` tokens our model puts after `ids` (L,), greedily, in the plainest loop there is."""
    cache = model.make_cache(**cache_options)
    for first in range(0, len(ids), chunk or len(ids)):
        last = last_logits(model, ids[None, first : first + (chunk or len(ids))], cache)
    tokens = [int(last.argmax())]
    while len(tokens) < steps:
        tokens.append(int(last_logits(model, np.array([tokens[-1:]], dtype=np.int32), cache).argmax()))
    return tokens


def logits_of(model, ids: np.ndarray, chunks=(), **cache_options) -> np.ndarray:
    """Our logits (B, L, V) of `ids` read in pieces that end at `chunks`, through a cache if there are any."""
    ids = mx.array(ids)
    if not chunks and not cache_options:
        return np.array(model(ids))
    cache = model.make_cache(**cache_options)
    edges = [0, *chunks, ids.shape[1]]
    parts = []
    for first, last in itertools.pairwise(edges):
        parts.append(model(ids[:, first:last], cache))
        mx.eval(parts[-1])
    return np.concatenate([np.array(part) for part in parts], axis=1)
