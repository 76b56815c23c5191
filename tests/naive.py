"""The slow oracle: Phi-3 from a config.json dictionary in float64 numpy, every formula written out.

No cache, no fused call, no code of the package: a model that is fed one more token is computed from the start.
Source: transformers `modeling_phi3`, `modeling_rope_utils`; LongRoPE is arXiv 2402.13753.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def weights_of(model) -> Weights:
    """The weights of an mlx model under their Hugging Face names, float64."""
    from mlx.utils import tree_flatten

    return {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(model.parameters())}


def rope_table(raw: dict, length: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, rotary dims / 2) of positions 0..length-1 of a sequence of `total` tokens."""
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    pairs = int(head_dim * raw.get("partial_rotary_factor", 1.0)) // 2
    scaling = raw["rope_scaling"]
    original, longest = raw["original_max_position_embeddings"], raw["max_position_embeddings"]
    factors, gain = [1.0] * pairs, 1.0
    if scaling is not None:
        factors = scaling["long_factor"] if total > original else scaling["short_factor"]
        stretch = longest / original
        gain = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    frequencies = [1.0 / (factors[k] * raw["rope_theta"] ** (2 * k / (2 * pairs))) for k in range(pairs)]
    angles = np.arange(length)[:, None] * np.array(frequencies)[None, :]
    return np.cos(angles) * gain, np.sin(angles) * gain


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """One head (L, D): dim k pairs with dim k + pairs; dims past the pairs pass through untouched."""
    pairs = cos.shape[1]
    first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """One head, q k v (L, D): query i sees keys j with i - window < j <= i."""
    length, dim = q.shape
    out = np.empty_like(q)
    for i in range(length):
        first = 0 if window is None else max(0, i - window + 1)
        scores = k[first : i + 1] @ q[i] / math.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[i] = (weights / weights.sum()) @ v[first : i + 1]
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def logits(raw: dict, weights: Weights, ids: np.ndarray, total: int | None = None) -> np.ndarray:
    """Logits (L, V) of one sequence `ids` (L,); `total` is its length for the LongRoPE rule, L if not given."""
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim, eps = raw["hidden_size"] // heads, raw["rms_norm_eps"]
    cos, sin = rope_table(raw, len(ids), len(ids) if total is None else total)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        rows = normed @ weights[prefix + "self_attn.qkv_proj.weight"].T
        blocks = [rows[:, dim * n : dim * (n + 1)] for n in range(heads + 2 * kv_heads)]
        seen = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            q, k, v = blocks[head], blocks[heads + kv], blocks[heads + kv_heads + kv]
            seen.append(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, raw["sliding_window"]))
        x = x + np.concatenate(seen, axis=1) @ weights[prefix + "self_attn.o_proj.weight"].T
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        both = normed @ weights[prefix + "mlp.gate_up_proj.weight"].T
        gate, up = both[:, : raw["intermediate_size"]], both[:, raw["intermediate_size"] :]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head_name = "model.embed_tokens.weight" if raw["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head_name].T


def greedy(raw: dict, weights: Weights, ids: np.ndarray, steps: int) -> list[int]:
    """The `steps` most likely tokens after `ids` (L,), each from a pass over everything before it."""
    tokens = list(ids)
    for _ in range(steps):
        tokens.append(int(logits(raw, weights, np.array(tokens))[-1].argmax()))
    return [int(token) for token in tokens[len(ids) :]]
