"""Small tokenizers in the family's shapes, made on the spot, and the oracles to hold ours against."""

import base64
import json
import shutil
from pathlib import Path

import tokenizers
from hypothesis import strategies as st

# Phi-3-mini's shape (June 2024): tokenizer.model, and the tokenizer.json that agrees with it.
TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
END, ASSISTANT, SYSTEM, USER, ENDOFTEXT = 4007, 4001, 4006, 4010, 4000

PHI4_MINI_TOKENS = ["<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>",
                    "<|tool|>", "<|/tool|>"]  # fmt: skip
PHI4_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]

WHITE = [0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F,
         0x3000]  # fmt: skip

ODD_TEXTS = [
    "", " ", "  ", "\n", "\t\ttab", " leading", "  two leading", "trailing  ", "▁", "▁▁mark ▁ here", " ▁", "\r\n\r\n",
    "naïve café — “quotes”", "日本語のテキスト", "中文，标点。", "ไทย", "עברית", "한국어", "😀", "👩‍👩‍👧‍👦 family",
    "e\u0301 combining", "\u200b\ufeffzero width", "\u3000ideographic space", "null\0inside", "\x1c\x1d\x1e\x1f",
    "\ue000private", "ﬁ ligature", "aaaaaaaaaaaaaaaaaaaa", "=====-----=====", "ananananana", "1234567890", "word" * 60,
    "3.14159e-10", "<0x0A> <0xFF>", "<s> </s> <unk>", "</s> x", "<s> x", "<|end|>", "<|end|>\n", "<|end|> \n\t x",
    "a<|end|>b", " <|user|> hi <|end|> ", "<|endoftext|>\n\nx", "<|end|><|end|>", "<|<|end|>|>", "<|end|", "<|END|>",
    "<|end|>\x1cx", "<|end|>\u3000x", "<|user|>\u200bx", "<|end|>▁x", "<|assistant|>\n<|user|>\n\n<|end|>",
]  # fmt: skip

_FRAGMENTS = [
    "<|end|>", "<|user|>", "<|endoftext|>", "<|assistant|>", "<s>", "</s>", "<|", "|>", "end", "<", " ", "  ", "\n",
    "\t", "▁", "\u3000", "\x1c", "\ue000", "\ue000\ue000", "the", " rabbit", "é", "日本", "😀", "<0x41>", "\0",
]  # fmt: skip
_anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
texts = st.lists(st.sampled_from(_FRAGMENTS) | _anything).map("".join)


def library(directory: Path, *, added: bool = True) -> tokenizers.Tokenizer:
    """The `tokenizers` library's own reading of a directory; with `added=False` of its ordinary text alone."""
    description = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    if not added:
        description["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def copy_of(source: Path, directory: Path, *, flags: dict[str, dict] | None = None, **config: object) -> Path:
    """`source` with other strip flags (`flags`: by token, "*" for all) and other tokenizer_config.json entries."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, directory)
    changed = lambda token: token | (flags or {}).get("*", {}) | (flags or {}).get(token["content"], {})  # noqa: E731
    description = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"] = [changed(token) for token in description["added_tokens"]]
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    declared = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {number: changed(token) for number, token in declared.items()}
    write_json(directory / "tokenizer.json", description)
    write_json(directory / "tokenizer_config.json", settings | config)
    return directory


def byte_level(directory: Path, added: list[str], *, strip: bool, **config: object) -> Path:
    """A byte-level BPE tokenizer.json like phi-4's: 256 bytes, a few merges, `added` after them."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the rabbit and the key", "hello naïve 日本 😀 the end"] * 9, trainer)
    for content in added:
        strips = strip and content != "<|endoftext|>"
        special = "tool" not in content
        made.add_tokens([tokenizers.AddedToken(content, rstrip=strips, normalized=False, special=special)])
    made.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>", **config})
    return directory


def tiktoken_ranks(directory: Path, **config: object) -> Path:
    """Ranks like cl100k_base's, with a handful of merges, and Phi-3-small's tokens on ids of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    merges = [b"th", b"the", b" the", b"en", b"end", b"ra", b"bb", b"it", b"\n\n", b"  ", b"\xc3\xa9", b"\xe6\x97"]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (directory / "sample.tiktoken").write_bytes(b"".join(lines))
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    declared = {str(300 + n): {"content": name, "special": True} for n, name in enumerate(names)}
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "added_tokens_decoder": declared}
    write_json(directory / "tokenizer_config.json", tokens | config)
    return directory


def blind(directory: Path) -> Path:
    """A byte-level tokenizer that sees no zero-width spaces: a text of them alone has no ids."""
    byte_level(directory, ["<|endoftext|>"], strip=False)
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    write_json(path, description)
    return directory
