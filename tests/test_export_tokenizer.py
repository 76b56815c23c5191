"""Tokenizers in exported GGUF files: read back they give the same ids; and the name that llama.cpp strips by."""

import base64
import json
import shutil
from pathlib import Path

import llama_cpp
import oracle
import pytest
from tokenizer_samples import (
    ODD_TEXTS,
    PHI4_MINI_TOKENS,
    PHI4_TOKENS,
    TINY,
    byte_level,
    copy_of,
    library,
    tiktoken_ranks,
)

pytest.importorskip("gguf")

from test_convert import write

from phi3_mlx import export_gguf
from phi3_mlx.conversion.gguf import naming
from phi3_mlx.conversion.gguf.naming import choose_name, llama_cpp_ids, sample_texts
from phi3_mlx.conversion.gguf.tokenizer import tokenizer_files
from phi3_mlx.conversion.gguf.vocabulary import unnamed_stops, vocabulary_metadata
from phi3_mlx.conversion.gguf.words import PRE_TOKENIZERS
from phi3_mlx.errors import OptionError, TokenizerError
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

RULE_OF_PHI_4 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Removed",
            "invert": True,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def back(folder: Path, directory: Path, rows: int = 5000) -> tuple[dict, Tokenizer, Tokenizer]:
    """The metadata, the tokenizer that our reader of GGUF makes of it, and the original."""
    original = read_tokenizer(directory)
    metadata = vocabulary_metadata(directory, original, rows)
    files = tokenizer_files(metadata, "model.gguf")
    folder.mkdir()
    for name in ("tokenizer", "tokenizer_config", "generation_config"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(files, name)), encoding="utf-8")
    return metadata, read_tokenizer(folder), original


def changed(directory: Path, change) -> Path:
    """The directory after `change(description of tokenizer.json)`."""
    description = json.loads((directory / "tokenizer.json").read_text())
    change(description)
    (directory / "tokenizer.json").write_text(json.dumps(description))
    return directory


def alike(ours: Tokenizer, original: Tokenizer, texts=ODD_TEXTS) -> bool:
    return all(
        ours.encode(text, special=special) == original.encode(text, special=special)
        for text in texts
        for special in (False, True)
    )


# ------------------------------------------------------------------------------------------ the vocabulary


def test_the_bundled_tokenizer_comes_back(tmp_path: Path):
    metadata, ours, original = back(tmp_path / "back", TINY, 4032)
    assert alike(ours, original)
    assert ours.stop_ids == original.stop_ids
    assert (ours.bos_token_id, ours.eos_token_id, ours.add_bos_token) == (1, 4000, False)
    assert ours.chat_template == original.chat_template
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.eot_token_id"] == 4007
    assert metadata["tokenizer.ggml.eom_token_id"] == 4001
    assert unnamed_stops(original) == []


def test_tokens_have_the_types_of_llama_cpps_converter_and_padding_is_unused():
    metadata = vocabulary_metadata(TINY, read_tokenizer(TINY), 4032)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(metadata["tokenizer.ggml.scores"]) == 4032
    assert (tokens[0], kinds[0]) == ("<unk>", 2)
    assert (tokens[4007], kinds[4007]) == ("<|end|>", 3)
    assert kinds[tokens.index("<0x0A>")] == 6
    assert kinds[tokens.index("▁the")] == 1
    assert tokens[4011:] == [f"[PAD{i}]" for i in range(4011, 4032)]
    assert {*kinds[4011:]} == {5}


def test_scores_of_tokenizer_json_join_as_those_of_sentencepiece(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    by_json = vocabulary_metadata(tmp_path / "model", read_tokenizer(tmp_path / "model"), 4032)
    (tmp_path / "model" / "tokenizer.json").unlink()
    pieces = vocabulary_metadata(tmp_path / "model", read_tokenizer(tmp_path / "model"), 4032)
    made = {kind: tokenizer_files(metadata, kind) for kind, metadata in (("json", by_json), ("pieces", pieces))}
    assert made["json"].tokenizer["model"]["merges"] == made["pieces"].tokenizer["model"]["merges"]
    assert by_json["tokenizer.ggml.unknown_token_id"] == pieces["tokenizer.ggml.unknown_token_id"] == 0
    assert by_json["tokenizer.ggml.tokens"] == pieces["tokenizer.ggml.tokens"]
    assert by_json["tokenizer.ggml.token_type"] == pieces["tokenizer.ggml.token_type"]


@pytest.mark.parametrize(("names", "rule"), [(PHI4_TOKENS, RULE_OF_PHI_4), (PHI4_MINI_TOKENS, None)])
def test_a_byte_level_tokenizer_comes_back(tmp_path: Path, names, rule):
    directory = byte_level(tmp_path / "model", names, strip=False, bos_token="<|endoftext|>", add_bos_token=True)
    if rule is not None:
        changed(directory, lambda description: description.update(pre_tokenizer=rule))
    metadata, ours, original = back(tmp_path / "back", directory)
    assert metadata["tokenizer.ggml.pre"] == ("dbrx" if rule else "gpt-2")
    words = [*ODD_TEXTS, "It's HelloWorld 12345 naïve\n\n  the end"]
    assert all(ours.encode(text) == original.encode(text) for text in words)
    assert ours.add_bos_token
    assert metadata["tokenizer.ggml.merges"] == [" ".join(m) for m in merges_of(directory)]


def merges_of(directory: Path) -> list:
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def test_tokens_that_anyone_may_write_are_user_defined_and_holes_are_padding(tmp_path: Path):
    directory = byte_level(tmp_path / "model", ["<|endoftext|>", "<|tool_call|>", "thinking"], strip=False)

    def change(description):
        for token in description["added_tokens"]:
            token["special"] = token["content"] == "<|endoftext|>"
            token["id"] += 7

    tokenizer = read_tokenizer(changed(directory, change))
    metadata = vocabulary_metadata(directory, tokenizer, 400)
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|endoftext|>"], kinds["<|tool_call|>"], kinds["thinking"]) == (3, 3, 4)
    assert kinds["[PAD332]"] == 5


def test_tiktokens_ranks_become_merges(tmp_path: Path):
    directory = tiktoken_ranks(tmp_path / "model")
    metadata, ours, original = back(tmp_path / "back", directory, 320)
    assert metadata["tokenizer.ggml.pre"] == "dbrx"
    words = ["the end of the rabbit", "a\n\nb  c", "naïve 日本 é", "12345 the  "]
    assert all(ours.encode(text) == original.encode(text) for text in words)


def test_ranks_that_no_merges_make_are_refused(tmp_path: Path):
    directory = tiktoken_ranks(tmp_path / "model")
    (file,) = directory.glob("*.tiktoken")
    lines = file.read_bytes().splitlines()
    lines.append(base64.b64encode(b"xyz") + b" %d" % len(lines))
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(TokenizerError, match="no merges make"):
        vocabulary_metadata(directory, read_tokenizer(directory), 320)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "cuts texts into words by a rule"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizes texts in a way"),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path: Path, change, said):
    directory = changed(byte_level(tmp_path / "model", PHI4_TOKENS, strip=False), change)
    with pytest.raises(TokenizerError, match=said):
        vocabulary_metadata(directory, read_tokenizer(directory), 400)


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path):
    directory = copy_of(TINY, tmp_path / "model")
    changed(directory, lambda d: d["model"].update(merges=d["model"]["merges"][::-1]))
    with pytest.raises(TokenizerError, match="merges that scores of tokens cannot say"):
        vocabulary_metadata(directory, read_tokenizer(directory), 4032)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(TokenizerError, match="4,011 tokens, but the model's embedding has 4,000 rows"):
        vocabulary_metadata(TINY, read_tokenizer(TINY), 4000)


def test_stops_beyond_three_roles_are_named_unless_llama_cpp_knows_them(tmp_path: Path):
    tokenizer = read_tokenizer(TINY)
    tokenizer.stop_ids |= {4006, 4010}
    assert unnamed_stops(tokenizer) == ["<|system|>", "<|user|>"]
    metadata = vocabulary_metadata(TINY, tokenizer, 4032)
    assert metadata["tokenizer.ggml.eom_token_id"] == 4001
    tokenizer.eos_token_id, tokenizer.stop_ids = 4007, {4000, 4001, 4007, 4010}
    assert unnamed_stops(tokenizer) == []  # <|endoftext|> takes no role from those that are not known by name


def test_a_token_with_the_name_of_padding_is_refused_by_that_name(tmp_path: Path):
    directory = byte_level(tmp_path / "model", ["<|endoftext|>", "[PAD399]"], strip=False)
    with pytest.raises(TokenizerError, match=r"has '\[PAD399\]' twice"):
        vocabulary_metadata(directory, read_tokenizer(directory), 400)


def test_named_templates_go_along(tmp_path: Path):
    tokenizer = read_tokenizer(TINY)
    tokenizer.named_templates = {"tool_use": "{{ tools }}"}
    metadata = vocabulary_metadata(TINY, tokenizer, 4032)
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def exported_with(rule, tmp_path: Path):
    directory = write(tmp_path / "model", {**oracle.slim(oracle.CONFIGS["phi-4"]), "vocab_size": 400})
    byte_level(directory, PHI4_MINI_TOKENS, strip=True)
    changed(directory, lambda description: description.update(pre_tokenizer=rule))
    return export_gguf(directory, tmp_path / "model.gguf")


@pytest.mark.parametrize(("rule", "said"), [(PRE_TOKENIZERS["gpt-4o"], True), (RULE_OF_PHI_4, False)])
def test_where_llama_cpp_cuts_words_at_marks_export_says_so(rule, said, tmp_path: Path):
    assert any("words at combining marks" in note for note in exported_with(rule, tmp_path).notes) == said


def test_a_refusal_names_the_models_own_tokenizer_and_no_copy_of_it(tmp_path: Path):
    with pytest.raises(TokenizerError) as refused:
        exported_with({"type": "Whitespace"}, tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'model' / 'tokenizer.json'} cuts texts into words by a rule")


# ------------------------------------------------------------------------------------------------- the name


def test_a_name_that_strips_is_made_for_a_tokenizer_that_strips():
    naming = choose_name(read_tokenizer(TINY), "tiny")
    assert naming.name == "Phi-3 tiny"
    assert naming.different == ()
    assert "take the white space after them" in naming.notes[0]
    assert choose_name(read_tokenizer(TINY), "my-phi3-model").name == "my-phi3-model"


def test_where_both_names_do_the_usual_one_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(naming, "sample_texts", lambda tokenizer: ["No control token."])
    for usual in ("mine", "my-phi3"):
        assert choose_name(read_tokenizer(TINY), usual).name == usual


def test_the_sample_texts_are_chats_and_every_token_at_white_space():
    tokenizer = read_tokenizer(TINY)
    texts = sample_texts(tokenizer)
    assert "<|user|>\nWhat is the capital of France?<|end|>" in "".join(texts)
    assert all(f"{content}\nHello" in texts for content in tokenizer.added_tokens)
    tokenizer.chat_template = None
    assert len(sample_texts(tokenizer)) == 4 * len(tokenizer.added_tokens)


def test_of_two_control_tokens_the_longer_is_read(tmp_path: Path):
    tokenizer = read_tokenizer(byte_level(tmp_path / "model", ["<|endoftext|>", "<|x|>", "<|x|>y"], strip=False))
    for text in ("a<|x|>y b", "<|x|>z", "<|x|><|x|>y"):
        assert llama_cpp_ids(tokenizer, text, strips=False) == tokenizer.encode(text, special=True)


def test_a_name_that_keeps_is_made_for_a_tokenizer_that_strips_nothing(tmp_path: Path):
    tokenizer = read_tokenizer(copy_of(TINY, tmp_path / "april", flags={"*": {"rstrip": False}}))
    naming = choose_name(tokenizer, "Phi-3-mini-4k-instruct")
    assert naming.name == "Phi 3-mini-4k-instruct"
    assert naming.different == ()
    assert choose_name(tokenizer, "mine").notes == ()


def test_a_given_name_is_taken_and_what_it_changes_is_said():
    naming = choose_name(read_tokenizer(TINY), "tiny", "My model")
    assert naming.name == "My model"
    assert len(naming.different) > 5
    assert f"gives other ids to {len(naming.different)} of {naming.of_texts} sample texts" in naming.notes[1]
    assert "under 'Phi-3 tiny' to 0" in naming.notes[1]


def test_where_no_name_is_right_the_texts_that_differ_are_counted_and_shown(tmp_path: Path):
    tokenizer = read_tokenizer(copy_of(TINY, tmp_path / "odd", flags={"<|user|>": {"rstrip": False}}))
    naming = choose_name(tokenizer, "tiny")
    assert naming.name == "Phi-3 tiny"
    assert naming.different
    assert all("<|user|>" in text for text in naming.different)
    assert "under no name does llama.cpp give this tokenizer's ids to" in naming.notes[-1]
    assert len(naming.different) > 3
    assert naming.notes[-1].endswith(f"such as {', '.join(map(repr, naming.different[:3]))}")


def test_a_vocabulary_without_the_tokens_that_llama_cpp_looks_up_gets_no_such_name(tmp_path: Path):
    tokenizer = read_tokenizer(byte_level(tmp_path / "model", PHI4_MINI_TOKENS, strip=True))
    naming = choose_name(tokenizer, "phi-3-mini-like")
    assert naming.name == "Phi 3-mini-like"
    assert naming.different
    with pytest.raises(OptionError, match=r"looks up </s>, <unk>, <s>, and this vocabulary has none"):
        choose_name(tokenizer, "mini", "Phi-3 mini")


def test_ids_by_llama_cpps_rule_are_the_librarys_where_flags_agree():
    tokenizer, reference = read_tokenizer(TINY), library(TINY)
    for text in [*sample_texts(tokenizer), *(text for text in ODD_TEXTS if "\u3000" not in text)]:
        assert llama_cpp_ids(tokenizer, text, strips=True) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.skipif(bool(llama_cpp.MISSING), reason=llama_cpp.MISSING)
def test_the_rule_and_the_refusal_are_the_real_llama_cpps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = {**oracle.slim(oracle.CONFIGS["phi-4"]), "vocab_size": 400}
    directory = write(tmp_path / "model", raw)
    byte_level(directory, PHI4_MINI_TOKENS, strip=True)
    changed(directory, lambda description: description.update(pre_tokenizer=RULE_OF_PHI_4))
    export_gguf(directory, tmp_path / "model.gguf")
    tokenizer = read_tokenizer(directory)
    texts = [text for text in (*sample_texts(tokenizer), *ODD_TEXTS) if text and "\0" not in text]
    answer = llama_cpp.ask(tmp_path / "model.gguf", texts=texts, plain=texts)
    assert answer.texts == [llama_cpp_ids(tokenizer, text, strips=False) for text in texts]
    assert answer.plain == [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(naming, "_LOOKED_UP", ())
    export_gguf(directory, tmp_path / "named.gguf", name="Phi-3 of another vocabulary")
    with pytest.raises(llama_cpp.LlamaCppError):
        llama_cpp.ask(tmp_path / "named.gguf", texts=["a"])
