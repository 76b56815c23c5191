"""Training data: every fault named by file, line and key; ids and loss mask; what becomes of long examples."""

import json

import numpy as np
import pytest
from test_chat import APRIL, JUNE, MEDIUM, NO_STRIP, STRIP_BUT_ASSISTANT, VISION
from tokenizer_samples import TINY, blind, copy_of
from tuning_models import facts, write_jsonl

from phi3_mlx.errors import ChatError, DataError, OptionError
from phi3_mlx.text.chat import render_chat, render_training_chat
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.checks import check_examples
from phi3_mlx.tuning.data import hold_out, read_data
from phi3_mlx.tuning.examples import Encoded, encode_records, histogram
from phi3_mlx.tuning.rows import Record
from phi3_mlx.tuning.settings import Settings

TALK = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "I am a rabbit."},
    {"role": "user", "content": "I am a rabbit."},
    {"role": "assistant", "content": "  No <|end|> you\nare not!\n"},
]
OK = {"prompt": "Hi", "completion": "Hello"}


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(TINY)


def record(messages=None, text=None):
    return Record("data.jsonl:7", None if messages is None else tuple(messages), text)


def learnt(tokenizer, ids, turns, turn):
    return [i for i, t in zip(ids, turns, strict=True) if t == turn]


# Lines


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"),
        ("[1]", "is a list; expected a JSON object"),
        ("{}", "is an empty object; expected"),
        ('{"prompts": "a"}', "has only the keys 'prompts'; expected"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"prompt": "a", "completion": 3}', "'completion' is a number; expected a text"),
        ('{"prompt": " ", "completion": "b"}', "'prompt' is empty"),
        ('{"text": null}', "'text' is null"),
        ('{"text": "a", "messages": []}', "has both 'messages' and 'text'"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": ["a"]}', r"messages\[0\] is a text"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"messages\[0\] 'role' is 'bot'; expected system, user"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\] 'role' is missing"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] 'content' is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)
def test_a_faulty_line_is_named(line, fault, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(OK) + "\n\n" + line + "\n" + json.dumps(OK) + "\n")
    with pytest.raises(DataError, match=rf"my\.jsonl:3: .*{fault}") as caught:
        read_data(path)
    assert "\n" not in str(caught.value)


def test_all_faulty_lines_are_named_up_to_twenty(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [OK, *[{"no": 1}] * 30])
    with pytest.raises(DataError) as caught:
        read_data(path)
    said = str(caught.value)
    assert "my.jsonl:2:" in said
    assert "my.jsonl:21:" in said
    assert "my.jsonl:22:" not in said
    assert "10 more" in said


def test_files_and_directories(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_data(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        read_data(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(OK).encode() + b"\r\n")
    assert [r.source for r in read_data(tmp_path).train] == [f"{tmp_path}/train.jsonl:1"]
    write_jsonl(tmp_path / "valid.jsonl", [OK] * 2)
    assert len(read_data(tmp_path).valid) == 2
    other = write_jsonl(tmp_path / "other.jsonl", [OK] * 3)
    assert len(read_data(tmp_path, other).valid) == 3
    write_jsonl(tmp_path / "valid.jsonl", [])
    with pytest.raises(DataError, match=r"valid\.jsonl holds no examples"):
        read_data(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: is not UTF-8"):
        read_data(tmp_path, other)


def test_holding_out_repeats_and_does_not_overlap(tmp_path):
    records = read_data(write_jsonl(tmp_path / "a.jsonl", facts(40))).train
    one, two, other = hold_out(records, 0.1, 0), hold_out(records, 0.1, 0), hold_out(records, 0.1, 1)
    assert [r.source for r in one.valid] == [r.source for r in two.valid] != [r.source for r in other.valid]
    assert len(one.valid) == 4
    assert not {r.source for r in one.valid} & {r.source for r in one.train}
    assert not hold_out(records[:9], 0.1, 0).valid


@pytest.mark.parametrize(
    ("examples", "share", "kept"),
    [
        (40, 0.05, 2),
        (12, 0.05, 1),
        (12, 0.96, 11),
        (12, 0.999, 11),
        (9, 0.05, 0),
        (9, 0.3, 2),
        (2, 0.9, 1),
        (1, 0.9, 0),
    ],
)
def test_holding_out_leaves_something_to_train_on(examples, share, kept):
    records = [Record(f"memory:{n}", None, "a ball") for n in range(examples)]
    splits = hold_out(records, share, 0)
    assert (len(splits.valid), len(splits.train)) == (kept, examples - kept)
    few = "1 example is too few" if examples == 1 else f"{examples} examples are too few"
    said = f"{kept} of {examples} examples were held out" if kept else few
    assert said in splits.notes[0]
    assert not hold_out(records, 0, 0).notes


# Ids and mask


@pytest.mark.parametrize(
    ("template", "flags"),
    [(JUNE, {}), (MEDIUM, {}), (VISION, STRIP_BUT_ASSISTANT), (APRIL, NO_STRIP), (JUNE, NO_STRIP)],
)
def test_ids_are_the_prompts_and_answers_are_what_follows_them(template, flags, tmp_path):
    """By ids: after the ids of the prompt of each turn come that turn's, which end with the token that stops."""
    words = read_tokenizer(copy_of(TINY, tmp_path, flags=flags))
    words.chat_template = template
    ids, turns = render_training_chat(words, TALK)
    assert ids == render_chat(words, TALK, add_generation_prompt=False)
    assert sorted(set(turns)) == [0, 1, 2]
    for turn, n in ((1, 1), (2, 3)):
        first = turns.index(turn)
        prompt = render_chat(words, TALK[:n])
        # White space that an answer begins with is not its own where the template's stands before it.
        assert ids[:first][: len(prompt)] == prompt
        assert len(words.decode(ids[len(prompt) : first]).strip()) == 0
        own = learnt(words, ids, turns, turn)
        assert own[-1] == words.token_to_id("<|end|>")
        assert words.token_to_id("<|end|>") not in own[:-1]
        assert words.decode(own).strip() == TALK[n]["content"].strip()
        assert turns[first : first + len(own)] == [turn] * len(own)


def test_the_same_words_of_the_user_are_not_learnt(tokenizer):
    """A search for the answer's text would find the question's, too."""
    ids, turns = render_training_chat(tokenizer, TALK)
    said = tokenizer.decode(learnt(tokenizer, ids, turns, 0))
    assert "I am a rabbit." in said
    assert tokenizer.decode(learnt(tokenizer, ids, turns, 1)).strip() == "I am a rabbit."
    assert turns[-1] == 0  # <|endoftext|> after the last turn, which generation does not reach


def test_a_template_that_rewrites_answers_is_refused(tokenizer, tmp_path):
    words = read_tokenizer(TINY)
    words.chat_template = JUNE.replace("message['content']", "message['content'] * 2")
    with pytest.raises(ChatError, match="changes what the assistant said"):
        render_training_chat(words, TALK)
    words.chat_template = JUNE.replace("message['content']", "message['content'] | trim")
    assert render_training_chat(words, TALK)[0] == render_chat(words, TALK, add_generation_prompt=False)
    words.chat_template = (
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*leaves out"):
        encode_records([record(TALK)], words, max_length=99)


def test_what_is_trained_can_be_chosen(tokenizer):
    def counted(train_on):
        example = encode_records([record(TALK)], tokenizer, max_length=200, train_on=train_on).examples[0]
        assert example.trained[-1]
        assert not example.trained[0]
        return int(example.trained.sum()), len(example)

    ids, turns = render_training_chat(tokenizer, TALK)
    assert counted("answers") == (sum(t > 0 for t in turns), len(ids) - 1)
    assert counted("last") == (turns.count(2), len(ids) - 1)
    assert counted("all") == (len(ids) - 1, len(ids))
    with pytest.raises(OptionError, match="train_on 'first'"):
        counted("first")


def test_texts_are_learnt_whole_with_their_end(tokenizer):
    eos = tokenizer.eos_token_id
    example = encode_records([record(text="A cat sat.")], tokenizer, max_length=99).examples[0]
    assert example.ids.tolist() == [*tokenizer.encode("A cat sat."), eos]
    assert example.trained.tolist() == [False] + [True] * (len(example) - 1)
    # One that a template has rendered already is taken as it is.
    rendered = "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>"
    example = encode_records([record(text=rendered)], tokenizer, max_length=99).examples[0]
    assert example.ids.tolist() == tokenizer.encode(rendered, special=True)


def test_a_text_of_which_the_tokenizer_makes_nothing_is_left_out_and_said(tmp_path):
    words = read_tokenizer(blind(tmp_path / "blind"))
    made = encode_records([record(text="\u200b"), record(text="the end")], words, max_length=99)
    assert [example.ids.tolist() for example in made.examples] == [
        [*words.encode("the end", special=True), words.eos_token_id]
    ]
    assert (made.empty, made.dropped, made.lengths[0]) == (["data.jsonl:7"], [], 0)
    settings = Settings(data="d", output="o", max_length=99)
    assert runs._losses(made, "training", settings) == [
        "1 training examples have nothing to learn and were left out: data.jsonl:7"
    ]
    nothing = encode_records([record(text="\u200b")], words, max_length=99)
    with pytest.raises(OptionError, match=r"0 are longer than max_length 99, 1 have nothing to learn; give others$"):
        check_examples(settings, nothing, Encoded(), resume=False)


# Long examples


def test_long_examples_are_dropped_cut_or_split_and_said(tokenizer):
    records = [record(text="a hat " * 30), record(text="a cat")]
    whole = encode_records(records, tokenizer, max_length=999).examples[0]
    for overflow in ("drop", "truncate", "split"):
        encoded = encode_records(records, tokenizer, max_length=20, overflow=overflow)
        assert all(len(example) <= 20 for example in encoded.examples)
        assert encoded.lengths[0] == len(whole) > 20
        assert encoded.examples[-1].ids.tolist() == [*tokenizer.encode("a cat"), tokenizer.eos_token_id]
        said = {"drop": encoded.dropped, "truncate": encoded.truncated, "split": encoded.split}
        assert said.pop(overflow) == ["data.jsonl:7"]
        assert not any(said.values())
        pieces = encoded.examples[:-1]
        if overflow == "drop":
            assert not pieces
        elif overflow == "truncate":
            assert [piece.ids.tolist() for piece in pieces] == [whole.ids[:20].tolist()]
        else:  # every trained token is predicted once
            predicted = [i for piece in pieces for i in piece.ids[piece.trained].tolist()]
            assert predicted == whole.ids[whole.trained].tolist()


def test_a_cut_that_leaves_nothing_to_learn_drops(tokenizer):
    long_prompt = [{"role": "user", "content": "ball " * 50}, {"role": "assistant", "content": "Yes."}]
    for overflow in ("truncate", "split"):
        encoded = encode_records([record(long_prompt)], tokenizer, max_length=10, overflow=overflow)
        assert all(example.trained.any() for example in encoded.examples)
    assert encode_records([record(long_prompt)], tokenizer, max_length=10, overflow="truncate").dropped


def test_fingerprint_knows_ids_and_mask(tokenizer):
    prints = {
        encode_records([record(TALK)], tokenizer, max_length=n, train_on=on, overflow="truncate").fingerprint()
        for n, on in ((99, "answers"), (99, "all"), (20, "answers"), (99, "answers"))
    }
    assert len(prints) == 3


def test_histogram_counts_all():
    lengths = [1, 2, 3, 4, 5, 8, 9, 600]
    rows = histogram(lengths)
    assert rows[:4] == [(1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2)]
    assert rows[-1] == (513, 1024, 1)
    assert sum(count for _, _, count in rows) == len(lengths)
    assert all(np.sum([first <= n <= last for n in lengths]) == count for first, last, count in rows)
    assert histogram([]) == []
