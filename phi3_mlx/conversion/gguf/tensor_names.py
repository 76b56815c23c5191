"""llama.cpp's names of a Phi-3 model's tensors, by ours. Source: `gguf.constants`, architectures PHI3 and PHIMOE."""

from __future__ import annotations

SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
ROUTER = "ffn_gate_inp.weight"
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# Of a decoder layer. Phi-3's files call gate and up together ffn_up.
IN_LAYER = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.switch_mlp.gate_proj": "ffn_gate_exps",
    "block_sparse_moe.switch_mlp.up_proj": "ffn_up_exps",
    "block_sparse_moe.switch_mlp.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_cpp_name(name: str) -> str:
    """llama.cpp's name of the tensor `name`: of model.layers.3.mlp.down_proj.weight it is blk.3.ffn_down.weight."""
    path, _, leaf = name.rpartition(".")
    if path in TOP:
        return f"{TOP[path]}.{leaf}"
    _, _, layer, inner = path.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[inner]}.{leaf}"
