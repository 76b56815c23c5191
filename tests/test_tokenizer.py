"""Every vocabulary against the library that defines it: `tokenizers` for tokenizer.json, tiktoken for ranks."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import (
    ASSISTANT,
    END,
    ENDOFTEXT,
    ODD_TEXTS,
    PHI4_MINI_TOKENS,
    PHI4_TOKENS,
    TINY,
    USER,
    WHITE,
    byte_level,
    copy_of,
    library,
    texts,
    tiktoken_ranks,
    write_json,
)

from phi3_mlx.errors import OptionError, PromptError, TokenizerError
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

# Our tokenizer under test: a folder of the fixture below, and the backend that reads it.
KINDS = {
    "json": ("tiny", "tokenizers"),
    "sentencepiece": ("tiny", "sentencepiece"),
    "april-json": ("april", "tokenizers"),
    "april-sentencepiece": ("april", "sentencepiece"),
    "lstrip-json": ("lstrip", "tokenizers"),
    "lstrip-sentencepiece": ("lstrip", "sentencepiece"),
    "transformers5": ("transformers5", "tokenizers"),
    "byte-level": ("byte-level", "tokenizers"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {
        "tiny": TINY,
        "april": copy_of(TINY, root / "april", flags={"*": {"rstrip": False}}),
        "lstrip": copy_of(TINY, root / "lstrip", flags={"<|end|>": {"lstrip": True}, "<s>": {"lstrip": True}}),
        "transformers5": copy_of(TINY, root / "transformers5"),
        "byte-level": byte_level(root / "byte-level", PHI4_MINI_TOKENS, strip=True),
        "ranks": tiktoken_ranks(root / "ranks"),
    }
    # What transformers 5 writes when it saves the tokenizer again: only text at the very beginning gets its mark.
    path = made["transformers5"] / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    write_json(path, description | {"normalizer": None, "pre_tokenizer": metaspace})
    return made


@pytest.fixture(scope="module")
def cases(folders: dict[str, Path]) -> dict:
    """For each kind: (our tokenizer, the library's full one, the library's one without added tokens)."""
    return {
        kind: (
            read_tokenizer(folders[name], backend=backend),
            library(folders[name]),
            library(folders[name], added=False),
        )
        for kind, (name, backend) in KINDS.items()
    }


def ids_of(oracle, text: str) -> list[int]:
    return oracle.encode(text, add_special_tokens=False).ids


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.add, ids), stream.finish()])


def agree(case, text: str) -> None:
    ours, full, plain = case
    with_special, without = ids_of(full, text), ids_of(plain, text)
    assert ours.encode(text, special=True) == with_special
    assert ours.encode(text) == without
    # Cutting first and encoding the pieces is the same; chat.py relies on it.
    assert ours.encode_pieces(ours.split_special(text)) == with_special
    control = {token.id for token in ours.added_tokens.values()} - {0}  # <unk> may stand for any character
    assert not control & set(without)
    for ids in (with_special, without):
        assert ours.decode(ids) == streamed(ours, ids) == full.decode(ids)
        assert ours.decode(ids, skip_special=False) == full.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts_agree_with_the_library(cases, kind: str):
    for text in ODD_TEXTS:
        agree(cases[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_agrees_with_the_library(cases, kind: str):
    @settings(max_examples=80, deadline=None)
    @given(texts)
    def check(text: str):
        agree(cases[kind], text)

    check()


@pytest.mark.parametrize("kind", ["json", "sentencepiece", "lstrip-sentencepiece"])
def test_white_space_that_strip_flags_swallow(cases, kind: str):
    ours, full, _ = cases[kind]
    for code in [*range(0x3001), 0xFEFF]:
        if code % 97 and code > 0x100 and code not in WHITE and not 0x1FF0 < code < 0x2070:
            continue
        for text in (f"<|end|>{chr(code)}a", f"a{chr(code)}<|end|>"):
            assert ours.encode(text, special=True) == ids_of(full, text), ascii(text)
    swallowed = [c for c in range(0x3001) if ours.split_special(f"<|end|>{chr(c)}") == [END]]
    assert swallowed == WHITE


def test_special_strings_are_text_unless_asked_for(cases):
    for kind in ("json", "sentencepiece"):
        ours = cases[kind][0]
        assert ours.encode("<|user|>\n<|end|>\n<|assistant|>\n", special=True) == [USER, END, ASSISTANT]
        assert END not in ours.encode("<|end|>")
        assert ours.decode(ours.encode("<|end|> </s>")) == "<|end|> </s>"
        assert ours.split_special("a <|end|>\n b<|endoftext|>\n") == ["a ", END, "b", ENDOFTEXT, "\n"]


def test_truncation_in_the_file_is_ignored(tmp_path: Path):
    folder = copy_of(TINY, tmp_path)
    full = library(folder)
    full.enable_truncation(3)
    full.enable_padding(length=64)
    full.save(str(folder / "tokenizer.json"))
    text = "once upon a time there was a rabbit"
    assert read_tokenizer(folder).encode(text, special=True) == ids_of(library(TINY), text)


@pytest.mark.parametrize("backend", ["tokenizers", "sentencepiece"])
def test_lone_surrogates_are_refused(backend: str):
    tokenizer = read_tokenizer(TINY, backend=backend)
    for special in (True, False):
        with pytest.raises(PromptError, match=r"U\+D83D, at character 3"):
            tokenizer.encode("ab\ud83d", special=special)
    with pytest.raises(PromptError, match=r"U\+D83D, at character 1"):
        tokenizer.encode_pieces([END, "\ud83d"])


def test_vocabulary_lookups(cases):
    for kind in ("json", "sentencepiece"):
        ours, full, _ = cases[kind]
        assert ours.vocab_size == full.get_vocab_size() == 4011
        assert [ours.id_to_token(i) for i in range(4011)] == [full.id_to_token(i) for i in range(4011)]
        assert ours.id_to_token(4011) is None
        for token in ("▁the", "<0x0A>", "<unk>", "<|end|>", "no such token", ""):
            assert ours.token_to_id(token) == full.token_to_id(token), token
        assert ours.special_ids == {0, 1, *range(4000, 4011)}  # </s> is declared as no special token
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, ENDOFTEXT, ENDOFTEXT)
        assert ours.add_bos_token is False


# ---------------------------------------------------------------------------------------- text again


@pytest.mark.parametrize("kind", ["json", "sentencepiece", "byte-level"])
def test_any_ids_decode_as_in_the_library(cases, kind: str):
    """Random ids, mostly bytes and control tokens: broken UTF-8, runs cut by hidden tokens, ids without meaning."""
    ours, full, _ = cases[kind]
    bytes_, top = (range(256), ours.vocab_size) if kind == "byte-level" else (range(3, 259), ours.vocab_size)
    smile = ours.encode("😀é")
    often = st.sampled_from([*bytes_]) | st.integers(top - 12, top + 3) | st.integers(0, 3) | st.sampled_from(smile)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(often | st.integers(0, top + 3), max_size=30))
    def check(ids: list[int]):
        assert ours.decode(ids) == full.decode(ids)
        assert streamed(ours, ids) == full.decode(ids)
        assert ours.decode(ids, skip_special=False) == full.decode(ids, skip_special_tokens=False)

    check()


@pytest.mark.parametrize("kind", ["json", "sentencepiece", "byte-level"])
def test_stream_never_shows_half_a_character(cases, kind: str):
    ours = cases[kind][0]
    text = "naïve 日本語 😀👩‍👩‍👧 the end"
    ids = ours.encode(text)
    assert len(ids) > len(text.split())
    stream, shown = ours.stream(), ""
    for token_id in ids:
        shown += stream.add(token_id)
        assert text.startswith(shown)
    assert shown + stream.finish() == text
    assert "\ufffd" not in shown


def test_stream_shows_plain_words_at_once(cases):
    for kind in ("json", "sentencepiece", "byte-level"):
        ours = cases[kind][0]
        stream = ours.stream()
        for token_id in ours.encode("the rabbit and the key"):
            assert stream.add(token_id)
        assert stream.finish() == ""


def test_stream_looks_at_every_token_once(cases, monkeypatch: pytest.MonkeyPatch):
    for kind in ("json", "sentencepiece", "byte-level"):
        ours, seen = cases[kind][0], []
        lookup = ours.id_to_token
        monkeypatch.setattr(ours, "id_to_token", lambda i, lookup=lookup, seen=seen: seen.append(i) or lookup(i))
        ids = ours.encode("日本語 the 😀 rabbit" * 50)
        streamed(ours, ids)
        assert seen == ids


# ------------------------------------------------------------------------------------------ tiktoken


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path]):
    """(our tokenizer, tiktoken's own over the same ranks with its own cl100k_base pattern)."""
    tiktoken = pytest.importorskip("tiktoken")
    return read_tokenizer(folders["ranks"]), reference_encoding(tiktoken, folders["ranks"] / "sample.tiktoken", 300)


def reference_encoding(tiktoken, path: Path, first_special: int):
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext import openai_public

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})  # its own would download
        pattern = openai_public.cl100k_base()["pat_str"]
    names = {"<|endoftext|>": 0, "<|system|>": 1, "<|user|>": 2, "<|assistant|>": 3, "<|end|>": 4}
    if first_special == 100257:
        names = {"<|endoftext|>": 0, "<|system|>": 4, "<|user|>": 5, "<|assistant|>": 6, "<|end|>": 9}
    special = {name: first_special + n for name, n in names.items()}
    return tiktoken.Encoding(
        "sample", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens=special
    )


def test_tiktoken_text_agrees_with_tiktoken(ranks):
    ours, theirs = ranks

    @settings(max_examples=150, deadline=None)
    @given(texts | st.sampled_from(ODD_TEXTS))
    def check(text: str):
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == streamed(ours, ours.encode(text)) == text

    check()


def test_tiktoken_ids_decode_as_in_tiktoken(ranks):
    ours, theirs = ranks

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, 267) | st.integers(300, 304)))
    def check(ids: list[int]):
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode([i for i in ids if i < 300])

    check()
    assert ours.decode([280, 104, -1, 999, 105]) == "hi"  # ids without meaning are passed over


@pytest.mark.parametrize("backend", ["tokenizers", "sentencepiece", "tiktoken"])
def test_a_pickled_tokenizer_makes_the_same_ids(tmp_path: Path, backend: str):
    """As another process gets it, also of one that was used before."""
    tokenizer = read_tokenizer(tiktoken_ranks(tmp_path) if backend == "tiktoken" else TINY, backend=backend)
    for text in ODD_TEXTS:
        tokenizer.encode(text)
    again = pickle.loads(pickle.dumps(tokenizer))
    for text in ODD_TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
        assert again.split_special(text) == tokenizer.split_special(text)
    assert (again.stop_ids, again.chat_template) == (tokenizer.stop_ids, tokenizer.chat_template)


def test_tiktoken_lookups(ranks):
    ours, _ = ranks
    assert (ours.token_to_id("the"), ours.token_to_id("<|end|>"), ours.token_to_id("nothing")) == (257, 304, None)
    assert (ours.id_to_token(257), ours.id_to_token(304), ours.id_to_token(280)) == ("the", "<|end|>", None)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (305, 300, 300)
    assert ours.stop_ids == {300, 304}


def test_tiktoken_missing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match=r'pip install "phi3-mlx\[tiktoken\]"'):
        read_tokenizer(folders["ranks"])


# --------------------------------------------------------------------------- what a directory says


def test_choice_of_file(tmp_path: Path):
    folder = copy_of(TINY, tmp_path)
    assert type(read_tokenizer(folder)).__name__ == "JsonTokenizer"
    assert type(read_tokenizer(folder, backend="sentencepiece")).__name__ == "SentencePieceTokenizer"
    (folder / "tokenizer.json").unlink()
    assert type(read_tokenizer(folder)).__name__ == "SentencePieceTokenizer"
    with pytest.raises(TokenizerError, match=r"looked for tokenizer\.json;"):
        read_tokenizer(folder, backend="tokenizers")
    with pytest.raises(OptionError, match="'spm' is unknown"):
        read_tokenizer(folder, backend="spm")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no config\.json, so it is not a model directory"):
        read_tokenizer(folder)
    (folder / "config.json").touch()
    with pytest.raises(TokenizerError, match=r"looked for tokenizer\.json, tokenizer\.model, \*\.tiktoken") as caught:
        read_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_stop_ids(tmp_path: Path):
    folder = copy_of(TINY, tmp_path / "a")
    assert read_tokenizer(folder).stop_ids == {ENDOFTEXT, ASSISTANT, END}
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 4007]})
    write_json(folder / "config.json", {"eos_token_id": 17})
    for backend in ("tokenizers", "sentencepiece"):
        assert read_tokenizer(folder, backend=backend).stop_ids == {2, 17, ENDOFTEXT, ASSISTANT, END}
    for wrong in ("<|end|>", [True], [4007, "2"], 4.0, -1, [4007, 2**24], 2**40):
        write_json(folder / "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(TokenizerError, match=r"generation_config\.json has eos_token_id"):
            read_tokenizer(folder)


def test_stop_ids_of_the_byte_level_models(tmp_path: Path):
    mini = read_tokenizer(byte_level(tmp_path / "mini", PHI4_MINI_TOKENS, strip=True))
    assert mini.stop_ids == {mini.token_to_id("<|end|>"), mini.token_to_id("<|endoftext|>")}
    big = read_tokenizer(byte_level(tmp_path / "big", PHI4_TOKENS, strip=True, eos_token="<|im_end|>"))
    assert big.stop_ids == {big.token_to_id("<|im_end|>"), big.token_to_id("<|endoftext|>")}
    assert big.eos_token_id == big.token_to_id("<|im_end|>")


def test_special_tokens_without_tokenizer_config(tmp_path: Path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    bare = read_tokenizer(tmp_path)
    assert (bare.vocab_size, bare.special_ids, bare.bos_token_id, bare.eos_token_id) == (4000, {0, 1, 2}, 1, 2)
    assert bare.encode("<s>hi", special=True)[0] == 1
    write_json(tmp_path / "added_tokens.json", {"<|end|>": 4007, "<|endoftext|>": 4000})
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}, "bos_token": None})
    named = read_tokenizer(tmp_path)
    assert (named.eos_token_id, named.bos_token_id, named.pad_token_id) == (4007, None, 4000)
    assert named.encode("<|end|>", special=True) == [4007]
    assert named.id_to_token(4003) is None


def test_bos_without_a_word_in_tokenizer_config(tmp_path: Path):
    """transformers 5 saves no add_bos_token; then the post-processor of tokenizer.json says it."""
    folder = copy_of(TINY, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["add_bos_token"]
    write_json(folder / "tokenizer_config.json", config)
    assert read_tokenizer(folder).add_bos_token is False
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, text],
        "special_tokens": special,
    }
    write_json(folder / "tokenizer.json", description | {"post_processor": template})
    tokenizer = read_tokenizer(folder)
    assert tokenizer.add_bos_token is True
    assert tokenizer.encode("hi", special=True) == library(TINY).encode("hi").ids  # `encode` itself never adds it
    write_json(folder / "tokenizer_config.json", config | {"add_bos_token": False})
    assert read_tokenizer(folder).add_bos_token is False


def test_where_the_chat_template_comes_from(tmp_path: Path):
    def template() -> str | None:
        return read_tokenizer(tmp_path, backend="sentencepiece").chat_template

    copy_of(TINY, tmp_path, chat_template=None)
    assert template() is None
    copy_of(TINY, tmp_path, chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": "d"}])
    assert template() == "d"
    write_json(tmp_path / "chat_template.json", {"chat_template": "from json"})
    assert template() == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja\n", encoding="utf-8")
    assert template() == "from jinja\n"


def test_other_chat_templates_have_names(tmp_path: Path):
    """Of a list in tokenizer_config.json, or of files, which hold instead of it."""
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    copy_of(TINY, tmp_path, chat_template=listed)
    tokenizer = read_tokenizer(tmp_path, backend="sentencepiece")
    assert (tokenizer.chat_template, tokenizer.named_templates) == ("d", {"tool_use": "t"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("from a folder", encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path, backend="sentencepiece")
    assert tokenizer.named_templates == {"tool_use": "t", "rag": "from a folder"}
    (tmp_path / "chat_template.jinja").write_text("j", encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path, backend="sentencepiece")
    assert (tokenizer.chat_template, tokenizer.named_templates) == ("j", {"rag": "from a folder"})
    (tmp_path / "additional_chat_templates" / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"bad\.jinja is not readable"):
        read_tokenizer(tmp_path, backend="sentencepiece")


def test_what_a_chat_template_knows_by_name(tmp_path: Path):
    """Every token that the files name, as transformers gives them; an absent one has no name."""
    tokens = {
        "bos_token": None,
        "eos_token": {"content": "<|end|>"},
        "image_token": "<|image|>",
        "add_bos_token": False,
    }
    copy_of(TINY, tmp_path, **tokens, extra_special_tokens={"audio_token": "<|audio|>"})
    named = read_tokenizer(tmp_path, backend="sentencepiece").special_tokens
    assert {name: named.get(name) for name in ("bos_token", "eos_token", "image_token", "audio_token")} == {
        "bos_token": None, "eos_token": "<|end|>", "image_token": "<|image|>", "audio_token": "<|audio|>"
    }  # fmt: skip
    assert "add_bos_token" not in named
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path, backend="sentencepiece").special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


# -------------------------------------------------------------------------------------- bad material

DAMAGED = [
    ("tokenizer.json", b"", "not a readable tokenizer.json"),
    ("tokenizer.json", b'{"version": "1.0", "model": ', "not a readable tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "decodes with none"),
    ("tokenizer.model", b"", "not a readable SentencePiece model"),
    ("tokenizer.model", b"\x0a\x0bnonsense\xff\xff", "not a readable SentencePiece model"),
    ("tokenizer_config.json", b"{", "not valid JSON"),
    ("tokenizer_config.json", b"\xff\xfe", "not valid JSON"),
    ("tokenizer_config.json", b"[]", "holds an empty list, not a JSON object"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template that is no text"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "rag"}]}', "chat_template that is no text: .*rag"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "x is .* expected a token's id"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"4000": {}}}', "4000.content is missing"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"4000": {"content": ""}}}', "4000 is .* and its content"),
    ("added_tokens.json", b'{"<|end|>": null}', "<.end.> is missing"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"16777216": {"content": "a"}}}', "16777216 is .* a token's"),
    ("added_tokens.json", b'{"": 4000}', "is 4000, expected a token"),
    ("added_tokens.json", b'{"<|end|>": 16777216}', "is 16777216, expected a whole number from 0 to 16,777,215"),
    ("added_tokens.json", b'{"<|end|>": 1.5}', "<.end.> is 1.5, expected a whole number"),
    ("tokenizer_config.json", b'{"eos_token": 3}', "eos_token is 3, expected a text"),
    ("tokenizer_config.json", b'{"add_bos_token": "yes"}', "add_bos_token is 'yes', expected true or false"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"4000": {"content": ["a"]}}}', "content is .* a text"),
    ("special_tokens_map.json", b"nonsense", "not valid JSON"),
    ("generation_config.json", b"nonsense", "not valid JSON"),
    ("chat_template.jinja", b"\xff", "is not readable"),
]  # fmt: skip


@pytest.mark.parametrize("highest", [2**24 - 1, 2**24, 2**32 - 1])
def test_an_id_far_beyond_all_others_takes_no_memory(tmp_path: Path, highest: int):
    """The `tokenizers` library lists the ids between them: 17 GB."""
    folder = copy_of(TINY, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["▁the"] = highest
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if highest < 2**24:
        tokenizer = read_tokenizer(folder, backend="tokenizers")
        assert tokenizer.vocab_size == highest + 1
        assert tokenizer.encode("the") == [highest]
    else:
        with pytest.raises(TokenizerError, match=rf"tokenizer\.json has a token of id {highest:,}, expected below"):
            read_tokenizer(folder, backend="tokenizers")


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damaged_files_give_one_line(tmp_path: Path, name: str, content: bytes, message: str):
    # added_tokens.json is read where tokenizer_config.json lists no added tokens.
    folder = copy_of(TINY, tmp_path, **({"added_tokens_decoder": None} if name == "added_tokens.json" else {}))
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(folder, backend="tokenizers" if name == "tokenizer.json" else "sentencepiece")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_added_tokens_of_another_model(tmp_path: Path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<|end|>": 3999})
    with pytest.raises(TokenizerError, match=r"declares <\|end\|> as id 3999, but .* of different models"):
        read_tokenizer(tmp_path)


def test_a_sentencepiece_model_whose_pieces_are_no_text_is_refused(tmp_path: Path):
    whole = (TINY / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole.replace("\u2581the".encode(), b"\xe2\x96\xfethe", 1))
    with pytest.raises(TokenizerError, match="not a readable SentencePiece model"):
        read_tokenizer(tmp_path)


def test_truncated_sentencepiece_model(tmp_path: Path):
    whole = (TINY / "tokenizer.model").read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match="not a readable SentencePiece model"):
            read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [*lines[:20], b"!!! 20"], "not a readable file of tiktoken ranks"),
        (lambda lines: [*lines[:20], b"QQ=="], "not a readable file of tiktoken ranks"),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], "do not count up from 0"),
        (lambda lines: [*lines, lines[3]], "do not count up from 0"),
        (lambda lines: lines[:200], "not every single byte"),
        (lambda lines: [], "not every single byte"),
        (lambda lines: [*lines, *(b"%s %d" % (b"eHh4" + b"eHh4" * n, 268 + n) for n in range(40))], "as id 300, which"),
    ],
)
def test_damaged_ranks(tmp_path: Path, edit, message: str):
    pytest.importorskip("tiktoken")
    path = tiktoken_ranks(tmp_path) / "sample.tiktoken"
    path.write_bytes(b"\n".join(edit(path.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)


def test_ranks_that_are_not_cl100k_need_declared_tokens(tmp_path: Path):
    pytest.importorskip("tiktoken")
    (tiktoken_ranks(tmp_path) / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="has 268 ranks, cl100k_base has 100,256"):
        read_tokenizer(tmp_path)


# -------------------------------------------------------------------------------- the released files


def lines_of(shared: Path) -> list[str]:
    """Some thousand real lines, every third with control tokens in and around it."""
    corpus = shared / "corpus"
    stories = [json.loads(line)["text"] for line in (corpus / "tinystories.jsonl").read_text("utf-8").splitlines()]
    questions = (corpus / "gsm8k_test.jsonl").read_text("utf-8").splitlines()
    books = (corpus / "gutenberg" / "Heidi_1448.txt").read_text("utf-8").split("\n\n")
    lines = [text[:150] for text in (*stories[::12], *questions[::2], *books[::3])]
    dressed = [f"<|user|>\n {line}<|end|>\n\n <|assistant|>\n{line[::-1]} <|endoftext|>\n" for line in lines[::3]]
    return lines + dressed


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-mini-april-2024"])
def test_released_mini(shared: Path, name: str):
    folder = shared / "tokenizers" / name
    lines = lines_of(shared)
    assert len(lines) > 2000
    full, plain = library(folder), library(folder, added=False)
    backends = ["tokenizers", "sentencepiece"] if (folder / "tokenizer.model").exists() else ["tokenizers"]
    for backend in backends:
        ours = read_tokenizer(folder, backend=backend)
        assert ours.stop_ids == {32000, 32001, 32007}
        assert ours.vocab_size == 32011
        for line in [*lines, *ODD_TEXTS]:
            ids = ids_of(full, line)
            assert ours.encode(line, special=True) == ids
            assert streamed(ours, ids) == ours.decode(ids) == full.decode(ids)
        for line in [*lines[::5], *ODD_TEXTS]:
            assert ours.encode(line) == ids_of(plain, line)


def test_released_mini_any_text(shared: Path):
    folder = shared / "tokenizers" / "phi-3-mini"
    case = read_tokenizer(folder, backend="sentencepiece"), library(folder), library(folder, added=False)

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text: str):
        agree(case, text)

    check()


def test_released_small(shared: Path):
    tiktoken = pytest.importorskip("tiktoken")
    folder = shared / "tokenizers" / "phi-3-small"
    ours, theirs = read_tokenizer(folder), reference_encoding(tiktoken, folder / "cl100k_base.tiktoken", 100257)
    assert ours.stop_ids == {100257, 100266}
    assert ours.bos_token_id == ours.eos_token_id == 100257
    assert ours.encode("<|endoftext|><|user|>\nHello<|end|>\n<|assistant|>\n", special=True) == [
        100257, 100262, 198, 9906, 100266, 198, 100263, 198]  # fmt: skip
    for line in [*lines_of(shared)[::2], *ODD_TEXTS]:
        ids = theirs.encode(line, allowed_special="all")
        assert ours.encode(line, special=True) == ids
        assert streamed(ours, ids) == ours.decode(ids)
        assert ours.decode(ids, skip_special=False) == line
