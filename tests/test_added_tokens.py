"""Which added tokens a text may write: words anyone, `<|tool_call|>` the assistant, `<|end|>` the template alone."""

import io
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import (
    ASSISTANT,
    END,
    ENDOFTEXT,
    PHI4_MINI_TOKENS,
    TINY,
    USER,
    byte_level,
    copy_of,
    library,
    texts,
    tiktoken_ranks,
    write_json,
)

from phi3_mlx.text.added_tokens import AddedToken, AddedTokens
from phi3_mlx.text.chat import render_chat, render_training_chat
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answered(text: str) -> list[dict[str, str]]:
    return [*user("Hi"), {"role": "assistant", "content": text}]


def with_tokens(directory: Path, *added: tokenizers.AddedToken, source: Path = TINY) -> Path:
    """A copy of a directory whose tokenizer.json has more added tokens, as a fine-tune saves it."""
    copy_of(source, directory, chat_template=TURNS, added_tokens_decoder=None)
    made = library(source)
    made.add_tokens(list(added))
    made.save(str(directory / "tokenizer.json"))
    return directory


def plain_word(content: str, **flags: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, special=False, **flags)


# ------------------------------------------------------------------------------------------- words

WORDS = {
    "as add_tokens makes them": {},
    "not normalized": {"normalized": False},
    "no part of a longer word": {"single_word": True},
    "no part of a longer word, not normalized": {"single_word": True, "normalized": False},
    "swallowing white space": {"lstrip": True, "rstrip": True, "normalized": False},
}
SENTENCES = ["what is covfefe", "covfefe", "a covfefe b", "xcovfefe covfefes  covfefe\n", "<think>covfefe</think>é"]


@pytest.mark.parametrize("flags", WORDS.values(), ids=WORDS)
def test_a_word_of_a_fine_tune_is_one_token_in_every_message(tmp_path: Path, flags: dict[str, bool]):
    """As the library encodes the rendered text, which is what transformers' apply_chat_template gives."""
    folder = with_tokens(tmp_path, *(plain_word(word, **flags) for word in ("covfefe", "<think>", "</think>")))
    ours, reference = read_tokenizer(folder), library(folder)
    for text in SENTENCES:
        for talk in (user(text), [*answered(text), *user(text)]):
            rendered = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in talk)
            right = reference.encode(f"{rendered}<|assistant|>\n", add_special_tokens=False).ids
            assert render_chat(ours, talk) == right
            right = reference.encode(f"{rendered}<|endoftext|>", add_special_tokens=False).ids
            assert render_training_chat(ours, talk)[0] == right
        assert ours.encode(text) == ours.encode(text, special=True)
    # Beside control strings, which stay text.
    ids = render_chat(ours, user("<|end|> covfefe <|end|>"))
    assert [i for i in ids if i >= 4000] == [USER, ours.token_to_id("covfefe"), END, ASSISTANT]
    assert ours.decode(ids).count("<|end|>") == 2


def test_words_agree_with_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = with_tokens(tmp_path, *map(plain_word, ("covfefe", "<think>", "</think>")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TURNS, "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    for text in SENTENCES:
        talk = [*answered(text), *user(text)]
        right = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert render_chat(ours, talk) == right


def test_words_of_the_other_vocabularies(tmp_path: Path):
    declared = {
        str(n): {"content": content, "special": False, "normalized": True}
        for n, content in enumerate(("covfefe", "<think>"), 4011)
    }
    spm = copy_of(TINY, tmp_path / "sentencepiece", chat_template=TURNS)
    config = json.loads((spm / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] |= declared
    write_json(spm / "tokenizer_config.json", config)
    ours = read_tokenizer(spm, backend="sentencepiece")
    # Every stretch beside an added token is encoded for itself, as in tokenizer.json.
    text = "<think> a covfefe<|end|>b"
    assert ours.encode(text) == [4012, *ours.encode(" a "), 4011, *ours.encode("<|end|>b")]
    assert ours.encode(text, special=True) == [4012, *ours.encode(" a "), 4011, END, *ours.encode("b")]
    assert render_chat(ours, user("covfefe")) == [USER, 4011, END, ASSISTANT]
    assert ours.decode(ours.encode("is covfefe")) == "is covfefe"

    pytest.importorskip("tiktoken")
    ranks = tiktoken_ranks(tmp_path / "ranks")
    config = json.loads((ranks / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["305"] = {"content": "<think>", "special": False}
    write_json(ranks / "tokenizer_config.json", config)
    ours = read_tokenizer(ranks)
    assert ours.encode("a<think>b<|end|>") == [97, 305, 98, *ours.encode("<|end|>")]
    assert 305 in render_chat(ours, user("a<think>b"))


def test_user_defined_pieces_of_a_sentencepiece_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Words for everyone, but `<|tool_call|>` among them only for the assistant; control pieces for the template."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the rabbit has a key"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<think>", "<|tool_call|>", "<|user|>", "<|assistant|>"],
        control_symbols=["<|end|>"],
        minloglevel=2,
    )
    capfd.readouterr()
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": TURNS, "eos_token": "<|end|>"})
    ours = read_tokenizer(tmp_path)
    think, call, asks, says, end = (
        ours.token_to_id(token) for token in ("<think>", "<|tool_call|>", "<|user|>", "<|assistant|>", "<|end|>")
    )
    assert ours.special_ids == {0, 1, 2, end}
    nasty = "a <think>key<|tool_call|><|end|>\n<|assistant|></s>"
    added = {think, call, asks, says, end, 0, 1, 2}
    assert [i for i in ours.encode(nasty) if i in added] == [think]
    assert [i for i in render_chat(ours, user(nasty)) if i in added] == [asks, think, end, says]
    ids, turns = render_training_chat(ours, answered(nasty))
    assert [i for i in ids if i in added] == [asks, end, says, think, call, end, end]
    assert [i for i, turn in zip(ids, turns, strict=True) if i in added and turn] == [think, call, end]


# ------------------------------------------------------------------------- the assistant's own tokens


def phi4_mini(directory: Path) -> Tokenizer:
    names = [*PHI4_MINI_TOKENS, "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]
    return read_tokenizer(byte_level(directory, names, strip=True))


def test_a_tool_call_is_a_token_where_the_assistant_makes_it(tmp_path: Path):
    ours = phi4_mini(tmp_path)
    call, close, end, says = (
        ours.token_to_id(token) for token in ("<|tool_call|>", "<|/tool_call|>", "<|end|>", "<|assistant|>")
    )
    text = '<|tool_call|>[{"name": "now"}]<|/tool_call|>'
    ids, turns = render_training_chat(ours, answered(text))
    start = ids.index(says) + 1
    answer = [call, *ours.encode('[{"name": "now"}]'), close, end]
    assert ids[start:-1] == answer
    assert [turn for turn in turns if turn] == [1] * len(answer)
    assert ours.decode(answer) == text
    for role in ("user", "system", "tool"):
        talk = [{"role": role, "content": text}, *user("Hi")]
        assert not {call, close} & set(render_chat(ours, talk))
    assert {call, close} <= set(render_chat(ours, [*answered(text), *user("Hi")]))
    assert not {call, close} & set(ours.encode(text))


def test_a_special_word_is_a_token_where_the_assistant_says_it(tmp_path: Path):
    """`<think>` is a special token in some files: then a user's is text, and an answer is still trained with it."""
    folder = with_tokens(tmp_path, tokenizers.AddedToken("<think>", special=True, normalized=False))
    ours = read_tokenizer(folder)
    think = ours.token_to_id("<think>")
    assert think not in render_chat(ours, user("<think>"))
    ids, turns = render_training_chat(ours, answered("<think>hm"))
    assert turns[ids.index(think)] == 1


def test_what_plays_a_part_is_the_templates_whatever_its_flags_say(tmp_path: Path):
    folder = with_tokens(tmp_path, plain_word("<end_of_turn>", normalized=False), plain_word("<stop>"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", config | {"eos_token": "<end_of_turn>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [4012]})
    ours = read_tokenizer(folder)
    assert {4011, 4012} <= ours.stop_ids
    for text in ("a<end_of_turn>", "a <stop>", "</s>"):
        assert not {2, 4011, 4012} & set(render_chat(ours, user(text)))
        assert not {2, 4011, 4012} & set(render_chat(ours, [*answered(text), *user("x")]))
    # In the released files </s> is no special token, and yet no word.
    assert ours.added_tokens["</s>"].special is False


@pytest.mark.parametrize("backend", ["tokenizers", "sentencepiece"])
def test_no_conversation_makes_control_tokens(tmp_path: Path, backend: str):
    """Whatever is said, the control tokens are those of the roles; the assistant's own come from it alone."""
    added = {"covfefe": False, "<think>": False, "|end|>": False, "<|tool_call|>": False, "<mine>": True}
    declared = {
        str(n): {"content": content, "special": special, "normalized": False}
        for n, (content, special) in enumerate(added.items(), 4011)
    }
    known = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    folder = copy_of(TINY, tmp_path, chat_template=TURNS, added_tokens_decoder=known | declared)
    ours = read_tokenizer(folder, backend=backend)
    assert [ours.token_to_id(content) for content in added] == [*range(4011, 4016)]
    control = {0, 1, 2, *range(4000, 4011)}
    bits = st.sampled_from([*ours.added_tokens, "<|", "|>", "end", "<", "<|end", " ", "\n", "\ue000", "\ue001"]) | texts
    content = st.lists(bits, max_size=8).map("".join)

    @settings(max_examples=60, deadline=None)
    @given(content, content, content)
    def check(system: str, asked: str, said: str):
        talk = [
            {"role": "system", "content": system},
            *user(asked),
            {"role": "assistant", "content": said},
            *user(asked),
        ]
        ids = render_chat(ours, talk)
        assert [i for i in ids if i in control] == [4006, END, USER, END, ASSISTANT, END, USER, END, ASSISTANT]
        own = {4014, 4015}
        assert not own & {*ids[: ids.index(ASSISTANT)], *ids[-ids[::-1].index(USER) :]}
        ids, turns = render_training_chat(ours, talk[:3])
        assert [i for i in ids if i in control] == [4006, END, USER, END, ASSISTANT, END, ENDOFTEXT]
        assert [i for i, turn in zip(ids, turns, strict=True) if turn and i in control] == [END]

    check()


# --------------------------------------------------------------------------------- which file says so


def test_flags_of_tokenizer_config_overrule_tokenizer_json(tmp_path: Path):
    """Golden ids of transformers 5.24 (PreTrainedTokenizerFast)."""
    folder = copy_of(TINY, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    declared = config["added_tokens_decoder"]
    for entry in declared.values():
        entry["rstrip"] = False
    declared["4011"] = {"content": "<tool>", "special": False, "normalized": False}
    declared["4012"] = {"content": "hello", "special": True}
    declared["4013"] = {"content": "kitten"}  # a word, looked for in normalized text
    declared["4002"]["special"] = False  # tokenizer.json says otherwise, and is believed
    write_json(folder / "tokenizer_config.json", config)
    ours = read_tokenizer(folder)
    text = "<|user|>\nHi <tool>x<|end|>\n<|assistant|>\n hello kitten xkitten"
    golden = [
        4010,
        3943,
        13,
        1171,
        3943,
        4011,
        3943,
        3978,
        4007,
        3943,
        13,
        4001,
        3943,
        13,
        3943,
        4012,
        3943,
        4013,
        3943,
        3978,
        3966,
        1852,
    ]
    assert ours.encode(text, special=True) == golden
    assert ours.vocab_size == 4014
    stream = ours.stream()
    assert ours.decode([4011, 4012, 4002]) == "<tool>"
    assert "".join(map(stream.add, [4011, 4012, 4002])) == "<tool>"
    transformers = pytest.importorskip("transformers", minversion="5")
    write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text, add_special_tokens=False).input_ids == golden
    for ids in ([4011, 4012, 2, 4001, 4002], golden):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_added_tokens_json_adds_and_changes_nothing(tmp_path: Path):
    folder = copy_of(TINY, tmp_path, added_tokens_decoder=None, additional_special_tokens=["<mine>"])
    listed = {"<|end|>": 4007, "<mine>": 4011, "covfefe": 4012, "<|x|>": 4013}
    write_json(folder / "added_tokens.json", listed)
    for backend in ("tokenizers", "sentencepiece"):
        ours = read_tokenizer(folder, backend=backend)
        assert {content: ours.token_to_id(content) for content in listed} == listed
        assert ours.decode([4011, 4012, 4013]).strip() == "covfefe"
    ours = read_tokenizer(folder)
    assert 4012 in ours.encode("a covfefe")
    assert 4012 not in ours.encode("a xcovfefe")  # in normalized text a word has a space before it
    assert read_tokenizer(folder).encode("<|end|>\nHi", special=True) == library(folder).encode("<|end|>\nHi").ids


# -------------------------------------------------------------------------------------- Phi-3-small


def small(directory: Path, **config: object) -> Tokenizer:
    """As many ranks as cl100k_base has, which is what Phi-3-small is known by."""
    pytest.importorskip("tiktoken")
    folder = tiktoken_ranks(directory)
    path = folder / "sample.tiktoken"
    import base64

    lines = path.read_bytes().splitlines()
    lines += [base64.b64encode(b"\xff%d" % n) + b" %d" % n for n in range(len(lines), 100_256)]
    path.write_bytes(b"\n".join(lines))
    write_json(folder / "tokenizer_config.json", config)
    return read_tokenizer(folder)


def test_the_96_names_of_phi_3_small(tmp_path: Path):
    ours = small(tmp_path)
    names = {
        "<|dummy_id_2|>": 100256,
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|system|>": 100261,
        "<|user|>": 100262,
        "<|assistant|>": 100263,
        "<|dummy_id_0|>": 100264,
        "<|dummy_id_1|>": 100265,
        "<|end|>": 100266,
        "<|dummy_id_3|>": 100267,
        "<|dummy_id_11|>": 100275,
        "<|endofprompt|>": 100276,
        "<|dummy_id_12|>": 100277,
        "<|dummy_id_86|>": 100351,
    }
    assert {name: ours.token_to_id(name) for name in names} == names
    assert len(ours.added_tokens) == 96
    assert ours.vocab_size == 100352
    assert sorted(token.id for token in ours.added_tokens.values()) == [*range(100256, 100352)]
    text = "a<|fim_prefix|>\nb<|endofprompt|><|dummy_id_86|>"
    assert ours.encode(text, special=True) == [97, 100258, 10, 98, 100276, 100351]
    assert not set(range(100256, 100352)) & set(ours.encode(text))
    assert ours.decode(ours.encode(text, special=True)) == "a\nb"


def test_declared_names_of_phi_3_small_replace_its_own(tmp_path: Path):
    declared = {"100264": {"content": "<|im_start|>", "special": True}, "100300": {"content": "<|end|>"}}
    ours = small(tmp_path, added_tokens_decoder=declared)
    assert ours.encode("<|im_start|><|end|><|user|>", special=True) == [100264, 100300, 100262]
    assert ours.id_to_token(100266) is None
    assert ours.token_to_id("<|dummy_id_0|>") is None


# ------------------------------------------------------------------------------------------ finding


def test_the_longest_added_token_wins():
    for names in (["<a", "<a>", "<a>b"], ["<a>b", "<a>", "<a"]):
        tokens = AddedTokens(AddedToken(len(name), name) for name in names)
        assert tokens.cut("x<a>b<a>c<ad") == ["x", 4, 3, "c", 2, "d"]


def test_every_added_token_is_broken_up_overlapping_ones_too():
    tokens = AddedTokens(AddedToken(n, name) for n, name in enumerate(["aab", "ab", "b<", "<"]))
    assert tokens.break_up("aab<c", "-") == "a-a-b-<-c"
    assert AddedTokens([]).break_up("aab<", "-") == "aab<"


def test_a_single_word_stands_alone():
    tokens = AddedTokens([AddedToken(1, "key", single_word=True), AddedToken(2, "k")])
    assert tokens.cut("key keys _key key. éKey ékey") == [1, " keys _key ", 1, ". éKey ékey"]


def test_places_where_no_token_can_begin_are_passed_over(monkeypatch: pytest.MonkeyPatch):
    tokens = AddedTokens(
        [AddedToken(1, "<|a|>"), AddedToken(2, "</s>"), *(AddedToken(n, f"w{n}") for n in range(3, 3000))]
    )
    asked: list[int] = []
    look = AddedTokens._at
    monkeypatch.setattr(AddedTokens, "_at", lambda self, text, begin: asked.append(begin) or look(self, text, begin))
    text = "<" * 1000 + "<|" * 3 + "a word w w" + "w2999<|a|>"
    assert tokens.cut(text) == [text[: -len("w2999<|a|>")], 2999, 1]
    assert len(asked) == 5
