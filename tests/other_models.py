"""Small random checkpoints of other families, as mlx-lm's own classes save them, with a tokenizer made here."""

import json
from importlib import import_module

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten, tree_map
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
WINDOW = 20  # of the models with sliding windows

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 400,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# model_type -> what its config.json says beside the shape
KINDS = {
    "llama": {},
    "qwen3": {},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": WINDOW,
    },
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "mamba": {
        "state_size": 4,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "intermediate_size": 64,
    },
}


def make_checkpoint(folder, kind="llama", **changes):
    """A directory that mlx-lm loads, of a model_type that is not Phi's."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    vocab_size = 256 + len(CONTROL)
    config = {"model_type": kind, "vocab_size": vocab_size, "eos_token_id": vocab_size - 2, **_SHAPE, **KINDS[kind]}
    config |= changes
    architecture = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(7)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    weights = tree_map(lambda array: 0.3 * mx.random.normal(array.shape), model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_tokenizer(folder):
    """Bytes, and control tokens of the ChatML form; `<|end|>`, which ends Phi's turns, is one of no meaning here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
