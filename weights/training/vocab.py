"""Our own SentencePiece tokenizer in Phi-3's shape, and the `tokenizer.json` that agrees with it.

Phi-3-mini's layout at an eighth of its size: 4,000 SentencePiece entries (<unk>, <s>, </s>, the 256
bytes, then BPE pieces) followed by the eleven added tokens in Phi-3's order, so id 32000 of the family
is id 4000 here. The added tokens carry the strip flags of the June-2024 release.
"""

import io
import json
from pathlib import Path

import sentencepiece as spm

PIECES = 4000
ADDED = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
         "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]  # fmt: skip
ENDOFTEXT, ASSISTANT, SYSTEM, END, USER = (
    PIECES + ADDED.index(f"<|{name}|>") for name in ("endoftext", "assistant", "system", "end", "user")
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train(texts, out: Path) -> spm.SentencePieceProcessor:
    """Train the SentencePiece model on `texts` and write every tokenizer file into `out`."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=100_000,
        character_coverage=0.9999,
        num_threads=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    (out / "tokenizer.json").write_text(json.dumps(fast_tokenizer(sp), ensure_ascii=False))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")
    return sp


def added_tokens() -> list[dict]:
    """The added tokens as `tokenizer.json` lists them: all but <unk>, <s> and <|endoftext|> strip to the right."""
    numbered = [*enumerate(["<unk>", "<s>", "</s>"]), *enumerate(ADDED, PIECES)]
    return [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": text not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": text != "</s>",
        }
        for i, text in numbered
    ]


def fast_tokenizer(sp: spm.SentencePieceProcessor) -> dict:
    """`tokenizer.json` for the `tokenizers` library: the same BPE, spelled as merges.

    SentencePiece merges the pair whose *result* has the best score; a merge list says the same when its
    pairs are ordered by the rank of what they make.
    """
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in range(3 + 256, len(pieces)):
        piece = pieces[i]
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        splits = [s for s in splits if s[0] in vocab and s[1] in vocab]
        merges += [((-sp.get_score(i), vocab[a], vocab[b]), [a, b]) for a, b in splits]
    space = "▁"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [pair for _, pair in sorted(merges)],
        },
    }


def tokenizer_config() -> dict:
    flags = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added_tokens()}
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": flags,
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
