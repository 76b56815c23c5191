"""Small models of Phi-3.5-MoE's architecture: transformers' and ours with the same weights, and a naive one in numpy.

Head shape, LongRoPE lists and the router's tolerance are the released model's; the rest is scaled down.
"""

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import naive
import numpy as np
import oracle
import released
from conftest import ROOT
from mlx.utils import tree_flatten

from phi3_mlx.models import build, parse_config

ORIGINAL = oracle.ORIGINAL
EXPERTS = 8

RAW = {
    "model_type": "phimoe",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "attention_bias": True,
    "lm_head_bias": True,
    "max_position_embeddings": ORIGINAL * 32,
    "original_max_position_embeddings": ORIGINAL,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {**released.PHI_3_5_MOE, "original_max_position_embeddings": ORIGINAL},
    "sliding_window": ORIGINAL * 32,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
MSCALES = {**RAW["rope_scaling"], "short_mscale": 1.1, "long_mscale": 1.3}
CONFIGS = {
    "released": RAW,
    "gain by regime": {**RAW, "rope_scaling": MSCALES},
    "plain": {
        **RAW,
        "rope_scaling": None,
        "attention_bias": False,
        "lm_head_bias": False,
        "original_max_position_embeddings": ORIGINAL * 32,
        "router_jitter_noise": 0.2,
    },
}


def random_weights(raw: dict, seed: int = 0, near: float = 0.03) -> dict[str, mx.array]:
    """Weights by our names, of a spread that makes every position matter; `near`: how alike routers' rows are in pairs.

    Scores within 2 % of each other then come up, and weights other than 1.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, array in tree_flatten(build(parse_config(raw)).parameters()):
        spread = 1.0 if "embed" in name else 0.3 if name.endswith("bias") else 1.2 / math.sqrt(array.shape[-1])
        values = rng.standard_normal(array.shape) * (0.2 if "norm.weight" in name else spread)
        weights[name] = mx.array((values + ("norm.weight" in name)).astype(np.float32))
    for name in [name for name in weights if name.endswith("moe.gate.weight")]:
        gate = np.array(weights[name])
        gate[1::2] = gate[::2] * (1 + near * rng.standard_normal((len(gate) // 2, 1)))
        weights[name] = mx.array(gate)
    return weights


def make_ours(raw: dict, seed: int = 0):
    model = build(parse_config(raw))
    model.load_weights(list(random_weights(raw, seed).items()))
    model.eval()
    return model


def hugging_face(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The release's layout: every expert's matrices apart."""
    result = {}
    for name, array in weights.items():
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            stem, found, leaf = name.partition(f"switch_mlp.{ours}.")
            if found:
                result |= {f"{stem}experts.{e}.{theirs}.{leaf}": array[e] for e in range(len(array))}
                break
        else:
            result[name] = array
    return result


def transformers_5(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The layout of transformers 5 in memory: experts fused, gate above up."""
    result = {}
    for name, array in weights.items():
        stem = name.partition("block_sparse_moe.")[0] + "mlp."
        if name.endswith("moe.gate.weight"):
            result[f"{stem}router.weight"] = array
        elif ".switch_mlp.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            result[f"{stem}experts.gate_up_proj"] = mx.concatenate([array, up], axis=1)
        elif ".switch_mlp.down_proj." in name:
            result[f"{stem}experts.down_proj"] = array
        elif ".switch_mlp." not in name:
            result[name] = array
    return result


def write(directory: Path, raw: dict, tensors: dict[str, mx.array], shards: int = 1, tokenizer: bool = False) -> Path:
    """A model directory of these tensors."""
    directory.mkdir()
    names = list(tensors)
    files = {}
    for i in range(shards):
        own = names[i::shards]
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(directory / file), {name: mx.contiguous(tensors[name]) for name in own})
        files |= dict.fromkeys(own, file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps(raw))
    if tokenizer:
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(ROOT / "weights" / "tiny" / file, directory)
    return directory


def make_torch(raw: dict, weights: dict[str, mx.array], long: bool = False):
    """transformers' model, float32. `long`: with the long factors, which version 5 never uses by itself."""
    import torch
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.set_num_threads(1)
    raw = json.loads(json.dumps(raw))
    if long:
        raw["rope_scaling"]["short_factor"] = raw["rope_scaling"]["long_factor"]
    theirs = PhimoeForCausalLM._from_config(PhimoeConfig.from_dict(raw), attn_implementation="eager").eval()
    theirs.load_state_dict({name: torch.tensor(np.array(a)) for name, a in transformers_5(weights).items()})
    return theirs


def reference(raw: dict, weights: dict[str, mx.array]):
    """(ids (L,), total) -> transformers' logits (L, V), in the regime of a sequence of `total` tokens."""
    models = {}

    def logits(ids: np.ndarray, total: int | None = None) -> np.ndarray:
        length = len(ids) if total is None else total
        long = raw["rope_scaling"] is not None and length > raw["original_max_position_embeddings"]
        if long not in models:
            models[long] = make_torch(raw, weights, long)
        return oracle.torch_logits(models[long], ids[None])[0]

    return logits


def naive_route(scores: np.ndarray, noise: float) -> list[tuple[int, float]]:
    """(expert, weight) of one token's two stages, by the formulas, in the precision of `scores` (experts,)."""
    chosen: list[tuple[int, float]] = []
    for _ in range(2):
        left = [i for i in range(len(scores)) if i not in [expert for expert, _ in chosen]]
        best = left[0]
        for i in left:
            best = i if scores[i] > scores[best] else best
        top = scores[best]
        total = 0.0
        for i in left:
            size = max(abs(scores[i]), top)
            distance = (top - scores[i]) / size if size else scores.dtype.type(0)
            if not distance > scores.dtype.type(2 * noise):
                total += math.exp(float(scores[i]) - float(top))
        chosen.append((best, 1 / total))
    return chosen


def naive_logits(raw: dict, weights: dict[str, np.ndarray], ids: np.ndarray, total: int | None = None) -> np.ndarray:
    """Logits (L, V) of one sequence in float64, token by token where tokens are routed."""
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim, eps, length = raw["hidden_size"] // heads, raw["rms_norm_eps"], len(ids)
    cos, sin = naive.rope_table({**raw, "partial_rotary_factor": 1.0}, length, total or length)
    if raw["rope_scaling"] is not None:
        regime = "long" if (total or length) > raw["original_max_position_embeddings"] else "short"
        own = raw["rope_scaling"][f"{regime}_mscale"]
        stretch = raw["max_position_embeddings"] / raw["original_max_position_embeddings"]
        gain = own / math.sqrt(1 + math.log(stretch) / math.log(raw["original_max_position_embeddings"]))
        cos, sin = cos * gain, sin * gain

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        )

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = norm(x, f"{prefix}input_layernorm")
        q, k, v = (linear(normed, f"{prefix}self_attn.{name}_proj") for name in "qkv")
        seen = []
        for head in range(heads):
            own = slice(dim * head, dim * (head + 1))
            kv = head // (heads // kv_heads)
            other = slice(dim * kv, dim * (kv + 1))
            turned = naive.rotate(q[:, own], cos, sin), naive.rotate(k[:, other], cos, sin)
            seen.append(naive.attention(*turned, v[:, other], raw["sliding_window"]))
        x = x + linear(np.concatenate(seen, axis=1), f"{prefix}self_attn.o_proj")
        normed = norm(x, f"{prefix}post_attention_layernorm")
        prefix += "block_sparse_moe."
        gate, up, down = (weights[f"{prefix}switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for t, row in enumerate(normed):
            for expert, weight in naive_route(linear(row, f"{prefix}gate"), raw["router_jitter_noise"]):
                opened = gate[expert] @ row
                x[t] += weight * (down[expert] @ (opened / (1 + np.exp(-opened)) * (up[expert] @ row)))
    return linear(norm(x, "model.norm"), "lm_head")
