"""The slow oracle of Phi-3-small: float64 numpy from a config.json dictionary, dense masks, every formula written out.

No cache, no blocks, no code of the package. Source: arXiv 2404.14219, section 2; `modeling_phi3_small`,
`configuration_phi3_small` and `positional_embedding` of the checkpoints.
"""

import math

import numpy as np
from naive import Weights, rotate

DUMMY = {100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352)}


def visible(raw: dict, head: int, length: int) -> np.ndarray:
    """Whether query i sees key j in a block-sparse layer: (length, length)."""
    block, local = raw["blocksparse_block_size"], raw["blocksparse_num_local_blocks"]
    stride, heads = raw["blocksparse_vert_stride"], raw["num_attention_heads"]
    step = 0 if raw["blocksparse_homo_head_pattern"] else max(1, int(stride / heads))
    mask = np.zeros((length, length), dtype=bool)
    for i in range(length):
        for j in range(i + 1):
            near = i // block - j // block < local
            mask[i, j] = near or (j // block + head * step + 1) % stride == 0
    return mask


def is_dense(raw: dict, layer: int) -> bool:
    every = raw["dense_attention_every_n_layers"]
    return bool(every) and (layer + 1) % every == 0


def rope_table(raw: dict, length: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, D / 2) of positions 0..length-1 of a sequence of `total` tokens."""
    pairs = raw["hidden_size"] // raw["num_attention_heads"] // 2
    scaling, position, factors, gain = raw.get("rope_scaling"), raw["rope_position_scale"], [1.0] * pairs, 1.0
    if scaling is not None:
        original, longest, position = scaling["original_max_position_embeddings"], raw["max_position_embeddings"], 1.0
        long = total > original
        factors = scaling["long_factor" if long else "short_factor"]
        gain = scaling.get("long_mscale" if long else "short_mscale", -1)
        if gain <= 0:
            gain = math.sqrt(1 + math.log(longest / original) / math.log(original)) if long else 1.0
    frequencies = [1.0 / (factors[k] * raw["rope_embedding_base"] ** (k / pairs)) for k in range(pairs)]
    angles = position * np.arange(length)[:, None] * np.array(frequencies)[None, :]
    return np.cos(angles) * gain, np.sin(angles) * gain


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """One head, q k v (L, D)."""
    scores = np.where(mask, q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weight + bias


def gegelu(x: np.ndarray, limit: float | None) -> np.ndarray:
    """(..., 2 n) -> (..., n): gates at even places, linear parts at odd ones."""
    gate, linear = x[..., 0::2].copy(), x[..., 1::2].copy()
    if limit is not None:
        gate[np.isfinite(gate) & (gate > limit)] = limit
        linear[np.isfinite(linear) & (linear > limit)] = limit
        linear[np.isfinite(linear) & (linear < -limit)] = -limit
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-1.702 * gate)) * (linear + 1)


def logits(
    raw: dict, weights: Weights, ids: np.ndarray, total: int | None = None, inside: dict | None = None
) -> np.ndarray:
    """Logits (L, V) of one sequence `ids` (L,); `total` is its length for the LongRoPE rule, L if not given.

    `inside` takes the stream after each layer, ("resid_post", layer), and the weights of its heads, ("pattern", layer).
    """
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim, group, eps = raw["hidden_size"] // heads, heads // kv_heads, raw["layer_norm_epsilon"]
    length = len(ids)
    cos, sin = rope_table(raw, length, length if total is None else total)
    scale = raw["mup_attn_multiplier"] / dim if raw["mup_use_scaling"] else 1 / math.sqrt(dim)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    x = weights["model.embed_tokens.weight"][ids]
    if raw["mup_embedding_multiplier"] is not None and raw["mup_embedding_multiplier"] > 0:
        x = x * raw["mup_embedding_multiplier"]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        rows = linear(norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn.query_key_value")
        seen = []
        for head in range(heads):
            kv, j = divmod(head, group)
            own = rows[:, kv * (group + 2) * dim : (kv + 1) * (group + 2) * dim]
            q, k, v = (own[:, n * dim : (n + 1) * dim] for n in (j, group, group + 1))
            mask = np.tri(length, dtype=bool) if is_dense(raw, layer) else visible(raw, head, length)
            seen.append(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, scale))
            if inside is not None:  # of values that are one for each key, the mix is the weights
                each = attention(rotate(q, cos, sin), rotate(k, cos, sin), np.eye(length), mask, scale)
                inside.setdefault(("pattern", layer), []).append(each)
        x = x + linear(np.concatenate(seen, axis=1), f"{prefix}.self_attn.dense")
        up = linear(norm(x, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp.up_proj")
        x = x + linear(gegelu(up, raw["gegelu_limit"]), f"{prefix}.mlp.down_proj")
        if inside is not None:
            inside["resid_post", layer] = x
    out = norm(x, "model.final_layernorm") @ weights["model.embed_tokens.weight"].T / (raw["mup_width_multiplier"] or 1)
    out[:, [n for n in DUMMY if n < raw["vocab_size"]]] = np.finfo(np.float32).min
    return out


def every_step(raw: dict, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Logits (L, V): row t is the last row of a pass over the first t + 1 of `ids`."""
    scaling = raw.get("rope_scaling")
    original = len(ids) if scaling is None else min(len(ids), scaling["original_max_position_embeddings"])
    return np.concatenate([logits(raw, weights, ids[:original]), logits(raw, weights, ids)[original:]])


def greedy(raw: dict, weights: Weights, ids: np.ndarray, steps: int) -> list[int]:
    """The `steps` most likely tokens after `ids` (L,), each from a pass over everything before it."""
    tokens = list(ids)
    for _ in range(steps):
        tokens.append(int(logits(raw, weights, np.array(tokens))[-1].argmax()))
    return [int(token) for token in tokens[len(ids) :]]
