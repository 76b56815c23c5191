"""Tokenizers out of GGUF metadata: against the files they were made of, and against tiktoken's words and merges."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizer_samples import ODD_TEXTS, TINY, library, texts

pytest.importorskip("gguf")

from gguf_samples import KINDS, TOY_TOKENS, sentencepiece_metadata

from phi3_mlx.conversion.gguf.tokenizer import tokenizer_files
from phi3_mlx.errors import TokenizerError
from phi3_mlx.text.chat import render_chat
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
WORDS = [
    "It's WHAT they'd've said, I'LL say: don't!", "HelloWorld fooBar XMLHttpRequest Éclair naïveÀ", "1 12 123 1234",
    "x1y22z333 3.14 ½ Ⅳ ٣٤٥", "a  b   c\n\nd \n e\t\tf\r\n\r\ng", "foo(bar)//baz\n/*qux*/\n\n", "'re 's 'S 'Re",
    "日本語 ไทย e\u0301", " lead", "tail ", "tail\n", "!?\n\n?!", "don’t", "a\u3000b\u00a0c", "_snake_case__", "ⅷ²³",
    "“x”—y…",
]  # fmt: skip


def declared(directory: Path) -> dict:
    return json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]


def written(directory: Path, metadata: dict) -> Tokenizer:
    """The tokenizer that our loader makes of the converted files."""
    files = tokenizer_files(metadata, "model.gguf")
    for name in ("tokenizer", "tokenizer_config", "generation_config"):
        (directory / f"{name}.json").write_text(json.dumps(getattr(files, name)), encoding="utf-8")
    return read_tokenizer(directory)


# ------------------------------------------------------------------------------------ SentencePiece


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    metadata = {
        **sentencepiece_metadata(TINY, declared(TINY)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 4000,
        "tokenizer.ggml.padding_token_id": 4000,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eot_token_id": 4007,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
        "tokenizer.chat_template.tool_use": "{{ tools | tojson }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    directory = tmp_path_factory.mktemp("tiny")
    return directory, written(directory, metadata)


def test_the_files_are_those_of_the_original(tiny):
    ours, original = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tiny[0], TINY))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in original["model"]["merges"]]
    assert ours["model"]["merges"] == pairs
    assert ours["model"]["vocab"] == original["model"]["vocab"]
    assert ours["added_tokens"] == original["added_tokens"]
    assert (ours["normalizer"], ours["decoder"]) == (original["normalizer"], original["decoder"])
    configs = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (tiny[0], TINY)]
    for key in ("added_tokens_decoder", "bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token"):
        assert configs[0][key] == configs[1][key]


def test_the_ids_are_those_of_sentencepiece(tiny):
    original = read_tokenizer(TINY, backend="sentencepiece")

    @settings(max_examples=80, deadline=None)
    @given(texts)
    def check(text: str):
        for special in (False, True):
            ids = original.encode(text, special=special)
            assert tiny[1].encode(text, special=special) == ids
            assert tiny[1].decode(ids) == original.decode(ids)

    for text in ODD_TEXTS:
        assert tiny[1].encode(text, special=True) == original.encode(text, special=True)
    check()


def test_what_else_the_loader_reads(tiny):
    tokenizer, original = tiny[1], read_tokenizer(TINY)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 4000, 4000)
    assert (tokenizer.add_bos_token, tokenizer.vocab_size) == (False, original.vocab_size)
    assert tokenizer.stop_ids == original.stop_ids
    assert (tokenizer.chat_template, tokenizer.named_templates) == (CHAT, {"tool_use": "{{ tools | tojson }}"})
    assert json.loads((tiny[0] / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [4000, 4007],
        "pad_token_id": 4000,
    }
    # <|user|> swallows the line end after it: GGUF does not say so, the vocabulary's names do.
    ids = render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    assert ids == [4010, *original.encode("Hello"), 4007, 4001]


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-4-mini"])
def test_flags_of_the_released_tokens(shared: Path, name: str):
    tokens = declared(shared / "tokenizers" / name)
    size = max(map(int, tokens)) + 1
    contents = [f"[{i}]" for i in range(size)]
    kinds = [int(KINDS.NORMAL)] * size
    for number, token in tokens.items():
        contents[int(number)] = token["content"]
        kinds[int(number)] = int(KINDS.CONTROL if token["special"] else KINDS.USER_DEFINED)
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.tokens": contents,
                "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": []}  # fmt: skip
    ours = tokenizer_files(metadata, "x.gguf").tokenizer_config["added_tokens_decoder"]
    flags = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    assert {i: [t[flag] for flag in flags] for i, t in ours.items()} == {
        i: [t[flag] for flag in flags] for i, t in tokens.items()
    }


def test_tool_tokens_are_shown_as_in_phi_4_mini_though_llama_cpp_calls_them_control_tokens():
    tokens = ["a", "<|user|>", "<|end|>", "<|tool_call|>", "<|/tool|>", "<|tag|>", "<think>"]
    kinds = [KINDS.NORMAL, *[KINDS.CONTROL] * 5, KINDS.USER_DEFINED]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": list(map(int, kinds)), "tokenizer.ggml.merges": []}  # fmt: skip
    made = tokenizer_files(metadata, "x.gguf").tokenizer_config["added_tokens_decoder"]
    assert [token["content"] for token in made.values() if not token["special"]] == [*tokens[3:5], "<think>"]


def test_the_released_vocabulary(shared: Path):
    folder = shared / "tokenizers" / "phi-3-mini"
    files = tokenizer_files(sentencepiece_metadata(folder, declared(folder)), "x.gguf")
    original = json.loads((folder / "tokenizer.json").read_text())
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in original["model"]["merges"]]
    assert files.tokenizer["model"]["merges"] == merges
    assert files.tokenizer["model"]["vocab"] == original["model"]["vocab"]
    assert files.tokenizer["added_tokens"] == original["added_tokens"]
    assert files.tokenizer_size == 32011  # the embedding's other rows are padding


def test_a_vocabulary_without_the_first_space_and_with_a_hole(tmp_path: Path):
    tokens = ["<unk>", "<s>", "</s>", "[PAD3]", "▁", "a", "▁a", "<0x0A>", "[PAD8]"]
    metadata = {
        **TOY_TOKENS,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -0.5, 0.0, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 5, 1, 1, 1, 6, 5],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = written(tmp_path, metadata)
    assert tokenizer.encode("a a\n") == [5, 6, 7]
    assert tokenizer.decode([5, 6]) == "a a"
    assert tokenizer.vocab_size == 8
    assert tokenizer.add_bos_token  # as llama.cpp assumes of SentencePiece vocabularies
    assert library(tmp_path).encode("a").ids == [1, 5]  # and what other programs put in front


# --------------------------------------------------------------------------------------- byte level


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str], dict[bytes, int]]:
    """A byte-level vocabulary: tokens in the order of their merges, those merges, and the same as tiktoken's ranks."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*WORDS, *WORDS, "the rabbit and the key, don't 123 12 1234 !!", *ODD_TEXTS], trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    ranks = {bytes(symbols[symbol] for symbol in token): i for i, token in enumerate(tokens)}
    return tokens, [" ".join(pair) for pair in model["merges"]], ranks


def byte_symbols() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for U+0100 and on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(odd)) for byte in range(256)]


def reference_pattern(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """How tiktoken itself cuts text into words for one of its encodings; its download is left out."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    return getattr(public, name)()["pat_str"]


@pytest.mark.parametrize(("pre", "encoding"), [
    ("gpt-2", "gpt2"), ("phi-2", "gpt2"), ("smollm", "gpt2"), ("starcoder", "gpt2"),
    ("llama-bpe", "cl100k_base"), ("dbrx", "cl100k_base"), ("gpt-4o", "o200k_base"),
])  # fmt: skip
def test_words_and_merges_are_tiktokens(tmp_path: Path, monkeypatch, trained, pre: str, encoding: str):
    tiktoken = pytest.importorskip("tiktoken")
    import regex  # tiktoken brings it

    tokens, merges, ranks = trained
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [int(KINDS.NORMAL)] * len(tokens),
    }
    ours = written(tmp_path, metadata)
    pattern = reference_pattern(monkeypatch, encoding)
    oracle = tiktoken.Encoding(pre, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    pieces = (lambda text: regex.split(r"(\p{N})", text)) if pre in ("smollm", "starcoder") else (lambda text: [text])

    def check(text: str):
        if encoding == "cl100k_base":
            text += "."  # at the end of a text tiktoken's newest form of this pattern keeps line ends and spaces as one
        assert ours.encode(text) == [number for piece in pieces(text) for number in oracle.encode_ordinary(piece)]
        assert ours.decode(ours.encode(text)) == text

    for text in [*WORDS, *ODD_TEXTS]:
        check(text)
    settings(max_examples=80, deadline=None)(given(texts)(check))()


def test_llamas_words_that_are_tokens_are_not_built(tmp_path: Path, trained):
    tokens, merges, _ = trained
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, "Ġqxz", "<|begin_of_text|>", "<|eot_id|>"],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [1, 3, 3],
        "tokenizer.ggml.bos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
    }
    llama = written(tmp_path, {**metadata, "tokenizer.ggml.pre": "llama-bpe"})
    assert llama.encode(" qxz") == [len(tokens)]
    assert llama.add_bos_token
    assert llama.stop_ids == {len(tokens) + 2}
    assert llama.encode("<|eot_id|>", special=True) == [len(tokens) + 2]
    assert len(llama.encode("<|eot_id|>")) > 1
    other = written(tmp_path, {**metadata, "tokenizer.ggml.pre": "dbrx"})
    assert len(other.encode(" qxz")) > 1  # no merge builds it
    assert not other.add_bos_token


# ----------------------------------------------------------------------------------------- refusals


BYTES = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
         "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.ggml.merges": ["a b"]}  # fmt: skip
REFUSED = {
    "has no tokenizer.ggml.model in its metadata": (TOY_TOKENS, {"model": None}),
    "has a tokenizer of the kind 'bert'; llama (SentencePiece) and gpt2": (TOY_TOKENS, {"model": "bert"}),
    "has no tokenizer.ggml.tokens": (TOY_TOKENS, {"tokens": None}),
    "has no tokenizer.ggml.scores": (TOY_TOKENS, {"scores": None}),
    "has no tokenizer.ggml.token_type": (TOY_TOKENS, {"token_type": None}),
    "has 7 tokens but 6 token types": (TOY_TOKENS, {"token_type": [1] * 6}),
    "has 7 tokens but 1 scores": (TOY_TOKENS, {"scores": [0.0]}),
    "has the token 'a' twice": (TOY_TOKENS, {"tokens": ["<unk>", "<s>", "</s>", "a", "a", "b", "c"]}),
    "has tokenizer.ggml.eos_token_id 7, which is none of its 7 tokens": (TOY_TOKENS, {"eos_token_id": 7}),
    "has tokenizer.ggml.bos_token_id 'x'": (TOY_TOKENS, {"bos_token_id": "x"}),
    "removes white space": (TOY_TOKENS, {"remove_extra_whitespaces": True}),
    "has no tokenizer.ggml.pre in its metadata": (BYTES, {"pre": None}),
    "has the pre-tokenizer 'qwen2', whose rules this package does not know; known: gpt-2": (BYTES, {"pre": "qwen2"}),
    "has the pre-tokenizer 'default'": (BYTES, {"pre": "default"}),
    "has no tokenizer.ggml.merges": (BYTES, {"merges": None}),
    "has the merge 'a c' (number 1)": (BYTES, {"merges": ["a b", "a c"]}),
    "has the merge 'b a' (number 0)": (BYTES, {"merges": ["b a"]}),
    "has the merge 'ab' (number 0)": (BYTES, {"merges": ["ab"]}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str):
    metadata, change = REFUSED[message]
    metadata = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        tokenizer_files({key: value for key, value in metadata.items() if value is not None}, "there.gguf")
    assert str(caught.value).startswith("there.gguf ")
    assert "\n" not in str(caught.value)
