"""Vocabularies of the released size in the real llama.cpp: those of Phi-4 (cl100k_base) and Phi-4-mini (o200k_base).

Their ranks are js-tiktoken's, which `make llama-cpp` installs beside llama.cpp.
"""

import base64
import json
import re
import unicodedata

import llama_cpp
import oracle
import pytest
from hard_texts import hard_texts
from test_convert import write
from test_export_tokenizer import RULE_OF_PHI_4
from tokenizer_samples import write_json

pytest.importorskip("gguf")

from phi3_mlx import export_gguf, load_tokenizer
from phi3_mlx.conversion.gguf.naming import llama_cpp_ids
from phi3_mlx.conversion.gguf.words import PRE_TOKENIZERS, byte_level
from phi3_mlx.text.streaming import bytes_to_symbols

RANKS = llama_cpp.HOME / "node_modules" / "js-tiktoken" / "dist" / "ranks"
pytestmark = [
    pytest.mark.skipif(bool(llama_cpp.MISSING), reason=llama_cpp.MISSING),
    pytest.mark.skipif(not RANKS.is_dir(), reason="no ranks here: `make llama-cpp` installs them"),
]
_TOOLS = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]
# Marks that belong to a letter, or to the sign before them.
MARKED = [
    *("हिन्दी में लिखा हुआ एक वाक्य", "สวัสดีครับ ผมชื่อ", "العَرَبِيَّةُ لُغَةٌ", "தமிழ் மொழி", "বাংলা ভাষা", "မြန်မာ", "ខ្មែរ"),
    *("שָׁלוֹם עולם", "Tie\u0302\u0301ng Vie\u0323\u0302t", "cafe\u0301 au lait", "❤\ufe0f<b>", "1\ufe0f\u20e3abc"),
]
PHI_4 = {100257: "<|endoftext|>", 100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>"}
PHI_4_MINI = {199999: "<|endoftext|>", 200018: "<|endofprompt|>"} | dict(
    enumerate(["<|assistant|>", "<|end|>", "<|user|>", "<|system|>", *_TOOLS, "<|tag|>"], 200019)
)


def ranks_of(name):
    """{bytes: rank}, of js-tiktoken's lines `! FIRST-RANK base64 base64 ...`."""
    script = (RANKS / f"{name}.js").read_text(encoding="utf-8")
    written = json.loads(script[script.index("{") : script.rindex("}") + 1])
    ranks = {}
    for line in written["bpe_ranks"].splitlines():
        _, first, *tokens = line.split(" ")
        ranks |= {base64.b64decode(token): int(first) + n for n, token in enumerate(tokens)}
    return ranks


def tokenizer_json(directory, ranks, added, rule, strips):
    """The released tokenizer.json, made of ranks as transformers makes it: the halves of a token are its best merge."""
    merges = []
    for token, rank in ranks.items():
        halves = ((token[:n], token[n:]) for n in range(1, len(token)))
        known = [(ranks[left], ranks[right], left, right) for left, right in halves if {left, right} <= ranks.keys()]
        merges += [(rank, *best) for best in sorted(known)]
    tokens = [
        {"id": i, "content": content, "special": "tool" not in content, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": strips and content != "<|endoftext|>"}
        for i, content in added.items()
    ]
    write_json(
        directory / "tokenizer.json",
        {
            "added_tokens": tokens,
            "normalizer": None,
            "pre_tokenizer": rule,
            "decoder": byte_level(True),
            "model": {
                "type": "BPE",
                "vocab": {bytes_to_symbols(token): rank for token, rank in ranks.items()},
                "merges": [[bytes_to_symbols(left), bytes_to_symbols(right)] for *_, left, right in sorted(merges)],
            },
        },
    )
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "added_tokens_decoder": {}})


def has_mark(text):
    return any(unicodedata.category(character).startswith("M") for character in text)


def model_of(directory, rows):
    return write(directory, {**oracle.slim(oracle.CONFIGS["phi-4"]), "vocab_size": rows, "num_hidden_layers": 1})


@pytest.mark.parametrize(
    ("name", "added", "rows", "rule", "mini"),
    [
        ("cl100k_base", PHI_4, 100352, RULE_OF_PHI_4, False),
        ("o200k_base", PHI_4_MINI, 200064, PRE_TOKENIZERS["gpt-4o"], True),
    ],
    ids=["phi-4", "phi-4-mini"],
)
def test_the_ids_of_a_thousand_texts_are_the_released_vocabularys(name, added, rows, rule, mini, tmp_path):
    """But for what export says of Phi-4-mini: white space behind control tokens stays, and marks cut words."""
    directory = model_of(tmp_path / "model", rows)
    tokenizer_json(directory, ranks_of(name), added, rule, strips=mini)
    made = export_gguf(directory, tmp_path / "model.gguf")
    tokenizer, texts = load_tokenizer(str(directory)), hard_texts()
    texts += [f"{text}{token}\n {text}" for token in added.values() for text in ("a", "12345 naïve", "é")]
    texts += MARKED
    answer = llama_cpp.ask(made.files[0], texts=texts, plain=texts)
    plain = [text for text, ids in zip(texts, answer.plain, strict=True) if ids != tokenizer.encode(text)]
    assert [text for text in plain if not has_mark(text)] == []
    assert bool(plain) == mini == any("words at combining marks" in note for note in made.notes)
    unmarked = [(text, ids) for text, ids in zip(texts, answer.texts, strict=True) if not has_mark(text)]
    assert [text for text, ids in unmarked if ids != llama_cpp_ids(tokenizer, text, strips=False)] == []
    different = [text for text, ids in unmarked if ids != tokenizer.encode(text, special=True)]
    stripping = re.compile("|".join(re.escape(content) + r"\s" for content in list(added.values())[1:]))
    assert [text for text in different if not stripping.search(text)] == []
    assert bool(different) == mini == bool(made.different_ids)
    if not mini:
        assert answer.texts == [tokenizer.encode(text, special=True) for text in texts]


def test_ids_of_tiktokens_own_file_are_llama_cpps(tmp_path):
    """Ranks without a tokenizer.json, as Phi-3-small has them, whose merges export finds."""
    directory, ranks = model_of(tmp_path / "model", 100352), ranks_of("cl100k_base")
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (directory / "cl100k_base.tiktoken").write_bytes(b"\n".join(lines))
    write_json(directory / "tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    export_gguf(directory, tmp_path / "model.gguf")
    tokenizer, texts = load_tokenizer(str(directory)), hard_texts()
    texts += MARKED
    answer = llama_cpp.ask(tmp_path / "model.gguf", texts=texts, plain=texts)
    assert answer.plain == [tokenizer.encode(text) for text in texts]
    assert answer.texts == [tokenizer.encode(text, special=True) for text in texts]
