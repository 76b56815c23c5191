"""Small GGUF files, written with the gguf library the way llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import oracle
import sentencepiece
from mlx.utils import tree_flatten
from tokenizer_samples import TINY

TYPES = gguf.GGMLQuantizationType
KINDS = gguf.TokenType

# A vocabulary for models whose tokenizer does not matter.
TOY_TOKENS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "b"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -0.5, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
PARTS = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def weights_of(raw: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a Phi-3 model, by Hugging Face's names."""
    return {name: np.array(array) for name, array in tree_flatten(oracle.make_ours(raw, seed).parameters())}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows k and k + dim / 2 of every head made neighbours: what llama.cpp does to Llama's queries and keys."""
    dim = len(rows) // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for k in range(dim // 2):
            result[head * dim + 2 * k] = rows[head * dim + k]
            result[head * dim + 2 * k + 1] = rows[head * dim + dim // 2 + k]
    return result


def phi3_tensors(raw: dict, weights: dict) -> dict[str, np.ndarray]:
    tensors = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if path in TOP:
            tensors[f"{TOP[path]}.weight"] = array
        else:
            _, _, layer, part = path.split(".", 3)
            tensors[f"blk.{layer}.{PARTS[part]}.weight"] = array
    scaling = raw["rope_scaling"] or {}
    for kind in ("long", "short"):
        if f"{kind}_factor" in scaling:
            tensors[f"rope_factors_{kind}.weight"] = np.array(scaling[f"{kind}_factor"], np.float32)
    return tensors


def llama_tensors(raw: dict, weights: dict) -> dict[str, np.ndarray]:
    """The same weights split and permuted."""
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    tensors = {}
    for name, array in phi3_tensors(raw, weights).items():
        if "attn_qkv" in name:
            dim = len(array) // (heads + 2 * kv_heads)
            q, k, v = np.split(array, [heads * dim, (heads + kv_heads) * dim])
            tensors[name.replace("qkv", "q")] = interleaved(q, heads)
            tensors[name.replace("qkv", "k")] = interleaved(k, kv_heads)
            tensors[name.replace("qkv", "v")] = v
        elif "ffn_up" in name:
            tensors[name.replace("up", "gate")], tensors[name] = np.split(array, 2)
        else:
            tensors[name] = array
    return tensors


def metadata_of(raw: dict, architecture: str) -> dict:
    """What llama.cpp's converter notes about a model; in Llama's files neither window nor original length."""
    dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    values = {
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "block_count": raw["num_hidden_layers"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.dimension_count": int(dim * raw.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(raw["rope_theta"]),
    }
    if architecture == "phi3":
        longest, original = raw["max_position_embeddings"], raw["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
        values["attention.sliding_window"] = raw["sliding_window"] or 0
        if raw["rope_scaling"]:
            values["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(longest / original) / np.log(original)))
    else:
        values["vocab_size"] = raw["vocab_size"]
    return {"general.name": "a sample", **{f"{architecture}.{key}": value for key, value in values.items()}}


def write_gguf(path: Path, architecture: str, metadata: dict, tensors: dict, types: dict | None = None) -> Path:
    """A GGUF file; `types` says in what type a tensor of that name is packed (those given as bytes already are)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, array in tensors.items():
        kind = (types or {}).get(name, TYPES.F32)
        if array.dtype != np.uint8:
            bf16 = np.array(mx.array(array).astype(mx.bfloat16).view(mx.uint16)).view(np.uint8)
            array = bf16 if kind == TYPES.BF16 else gguf.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Packed bytes (rows, bytes a row) for types that the library only reads: any bits, but small scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    count = shape[0] * shape[1] // block
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    places = {
        TYPES.Q2_K: (80, 82),
        TYPES.Q3_K: (108,),
        TYPES.Q4_K: (0, 2),
        TYPES.Q5_K: (0, 2),
        TYPES.Q6_K: (208,),
        TYPES.IQ4_NL: (0,),
        TYPES.IQ4_XS: (0,),
    }[kind]
    for place in places:
        scales = rng.uniform(0.004, 0.06, count).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks.reshape(shape[0], -1)


def sentencepiece_metadata(directory: Path = TINY, declared: dict | None = None, padding: int = 21) -> dict:
    """A SentencePiece model and the tokens added to it, as llama.cpp's converter of Phi-3 notes them."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    size = model.get_piece_size()
    tokens, scores, kinds = [], [], []
    for i in range(size):
        special = KINDS.UNKNOWN if model.is_unknown(i) else KINDS.CONTROL if model.is_control(i) else None
        kinds.append(int(special or (KINDS.BYTE if model.is_byte(i) else KINDS.NORMAL)))
        tokens.append(model.id_to_piece(i))
        scores.append(model.get_score(i))
    longest = max([size - 1, *map(int, declared or {})]) + padding
    for i in range(size, longest + 1):
        tokens.append(f"[PAD{i}]")
        scores.append(-10000.0)
        kinds.append(int(KINDS.UNUSED))
    for number, token in (declared or {}).items():
        tokens[int(number)], scores[int(number)] = token["content"], -1000.0
        kinds[int(number)] = int(KINDS.CONTROL if token["special"] else KINDS.USER_DEFINED)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }
