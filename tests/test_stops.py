"""Where answers end: at stop strings across every edge, and at control tokens that stop strings name."""

import itertools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import ASSISTANT, END, PHI4_TOKENS, SYSTEM, TINY, USER, byte_level, tiktoken_ranks, write_json

from phi3_mlx import Conversation, batch_generate, generate, load, stream_generate
from phi3_mlx.cli import main
from phi3_mlx.errors import OptionError
from phi3_mlx.text.stops import Stops, StopStrings
from phi3_mlx.text.tokenizer import read_tokenizer

HELLO, YOU, NEW_LINE, SPACE, PLACE = 316, 354, 13, 3943, 4002


def speaking(folder: Path, *said: int) -> Path:
    """A model directory that answers any prompt with these tokens, each of them once, and ends with <|end|>."""
    width, vocabulary = 64, 4032
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    embedding, head = np.zeros((2, vocabulary, width), np.float32)
    for n, (token, following) in enumerate(itertools.pairwise([ASSISTANT, *said, END])):
        embedding[token, n] = head[following, n] = 1
    layer = "model.layers.0."
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": np.ones(width, np.float32),
        f"{layer}self_attn.qkv_proj.weight": np.zeros((3 * width, width), np.float32),
        f"{layer}self_attn.o_proj.weight": np.zeros((width, width), np.float32),
        f"{layer}mlp.gate_up_proj.weight": np.zeros((3 * width, width), np.float32),
        f"{layer}mlp.down_proj.weight": np.zeros((width, 3 * width // 2), np.float32),
        f"{layer}input_layernorm.weight": np.ones(width, np.float32),
        f"{layer}post_attention_layernorm.weight": np.ones(width, np.float32),
    }
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(value) for name, value in weights.items()})
    kept = {key: config[key] for key in ("model_type", "rms_norm_eps") if key in config}
    shape = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width // 2}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4096}
    write_json(folder / "config.json", {**kept, **shape, **heads, "torch_dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory):
    """Says: He\\n<|user|> you<|system|> <|placeholder1|>"""
    return load(speaking(tmp_path_factory.mktemp("chatty"), HELLO, NEW_LINE, USER, YOU, SYSTEM, SPACE, PLACE))


ENDS = {
    "<|user|>": "He\n",
    "<|user|>\n": "He\n",  # the token swallows the line end, so this is the token alone
    "\n<|user|>": "He",
    "e\n<|user|> y": "H",
    "<|user|> you<|system|>": "He\n",
    "<|system|>": "He\n you",
    "you<|system|>": "He\n ",
    "you<|end|>": "He\n you ",  # not said
    " <|user|>": "He\n you ",
    " <|placeholder1|>": "He\n you",
    "user": "He\n you ",  # no part of what the answer shows
    "you": "He\n ",
    "\n": "He",
}


@pytest.mark.parametrize(("stop", "expected"), ENDS.items())
def test_a_stop_string_may_be_a_control_token_or_hold_one(chatty, stop: str, expected: str):
    model, tokenizer = chatty
    assert generate(model, tokenizer, "Hi", max_tokens=20, stop=stop) == expected
    assert generate(model, tokenizer, "Hi", max_tokens=20, stop=["never", stop]) == expected
    assert batch_generate(model, tokenizer, ["Hi", "Hello there"], max_tokens=20, stop=[stop]) == [expected] * 2
    for lookup in (0, 16):
        chunks = list(stream_generate(model, tokenizer, "Hi", max_tokens=20, stop=stop, lookup=lookup))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"


def test_of_several_stops_the_first_ends_the_answer(chatty):
    model, tokenizer = chatty
    for stops, expected in (
        (["you", "<|user|>"], "He\n"),
        (["<|system|>", "\n"], "He"),
        (["<|system|>", "yo"], "He\n "),
    ):
        assert generate(model, tokenizer, "Hi", max_tokens=20, stop=stops) == expected


def test_an_answer_too_short_for_its_stop_string_is_whole(chatty):
    model, tokenizer = chatty
    assert generate(model, tokenizer, "Hi", max_tokens=2, stop="\n<|user|>") == "He\n"
    assert generate(model, tokenizer, "Hi", max_tokens=5, stop="you<|system|>") == "He\n "


def test_the_command_line_and_chat_stop_at_control_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = speaking(tmp_path, HELLO, USER, YOU)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "-m", str(folder), "-p", "Hi", "--stop", "<|user|>", "--stop", "zzz"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "He\n"


def test_a_conversation_goes_on_after_a_stop_token_without_it(chatty):
    model, tokenizer = chatty
    for stop in ("<|user|>", "\n<|user|>", "<|user|> y"):
        conversation = Conversation(model, tokenizer)
        first = "".join(chunk.text for chunk in conversation.send("Hi", max_tokens=20, stop=stop))
        again = "".join(chunk.text for chunk in conversation.send("Hi", max_tokens=20, stop=stop))
        assert first == again == ENDS.get(stop, "He\n")
        turns = [USER, END, ASSISTANT, END, USER, END, ASSISTANT]
        assert [i for i in conversation._actual if i >= 4000] == turns
        assert tokenizer.decode(conversation._actual).count(first.strip()) == 1


def test_tokens_of_other_vocabularies_as_stops(tmp_path: Path):
    big = read_tokenizer(byte_level(tmp_path / "big", PHI4_TOKENS, strip=True, eos_token="<|im_end|>"))
    start, end, text_end = (big.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert Stops(big, ["the end", "<|im_start|>", "\n\n<|im_sep|>"]).ids == {start, end, text_end}
    assert Stops(big, ["\n\n<|im_sep|>"]).hidden == {big.token_to_id("<|im_sep|>"): "<|im_sep|>"}
    pytest.importorskip("tiktoken")
    ranks = read_tokenizer(tiktoken_ranks(tmp_path / "ranks"))
    assert Stops(ranks, ["<|user|>", "the"]).ids == ranks.stop_ids | {ranks.token_to_id("<|user|>")}


def test_a_token_that_ends_answers_is_seen_by_stop_strings_though_it_is_no_special_one():
    tokenizer = read_tokenizer(TINY)
    assert Stops(tokenizer, ["x</s>"]).hidden == {}  # an answer shows it
    tokenizer.stop_ids |= {2}
    assert Stops(tokenizer, ["x</s>"]).hidden == {2: "</s>"}


def test_half_a_character_is_no_stop_string(chatty):
    model, tokenizer = chatty
    with pytest.raises(OptionError, match="stop"):
        generate(model, tokenizer, "Hi", stop="a\ud83d")


# ----------------------------------------------------------------------------------------- the finder


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["abcabd"], ["a"], ["cd", "abcde"]])
def test_stop_strings_across_every_edge(stops):
    """Whatever the cuts, the text before the first stop string comes out, and nothing of it."""
    text = "xaabcabcabdabcdey"
    ends = [text.index(stop) for stop in stops if stop in text]
    expected = text[: min(ends)] if ends else text
    for cuts in itertools.combinations(range(1, len(text)), 2):
        finder, out = StopStrings(stops), []
        for first, last in itertools.pairwise([0, *cuts, len(text)]):
            piece, hit = finder.add(text[first:last])
            out.append(piece)
            if hit:
                break
        else:
            out.append(finder.finish())
        got = "".join(out)
        # Of two stop strings the one that is complete first ends the text.
        assert got == expected or (len(stops) > 1 and any(text.startswith(got + stop) for stop in stops))


def test_the_first_of_two_stop_strings_in_one_piece():
    assert StopStrings(["END", "STOP"]).add("one STOP two END") == ("one ", True)
    assert StopStrings(["STOP", "END"]).add("one STOP two END") == ("one ", True)
    assert StopStrings(["cd", "bcd", "d"]).add("abcde") == ("a", True)


def test_what_is_hidden_belongs_to_stop_strings_and_never_comes_out():
    finder = StopStrings(["a<x>b", "<y>"])
    assert finder.add("aa", "<x>") == ("a", False)
    assert finder.add("c") == ("ac", False)
    assert finder.add("za", "<x>") == ("z", False)
    assert finder.finish() == "a"
    finder = StopStrings(["a<x>b", "<y>"])
    assert finder.add("a", "<x>") == ("", False)
    assert finder.add("b") == ("", True)
    assert StopStrings(["<y>"]).add("ab", "<y>") == ("ab", True)
    assert StopStrings([]).add("ab", "<y>") == ("ab", False)


def naive(stops: list[str], text: str) -> str:
    """The text before the stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))]
    return text


def test_any_stop_strings_in_any_pieces():
    letters = st.text("ab<é", max_size=12)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(letters.filter(bool), max_size=4), st.lists(letters, max_size=8))
    def check(stops: list[str], pieces: list[str]):
        finder, out = StopStrings(stops), ""
        for n, piece in enumerate(pieces, 1):
            text, hit = finder.add(piece)
            out += text
            if hit:
                break
            held = "".join(pieces[:n])[len(out) :]
            assert not held or any(stop.startswith(held) for stop in stops)
        else:
            out += finder.finish()
        assert out == naive(stops, "".join(pieces))

    check()


def test_a_long_stop_string_costs_one_comparison_a_character():
    """Not the square of its length a token, also where it nearly repeats itself."""
    steps = 0

    class Counted(list):
        def __getitem__(self, i):
            nonlocal steps
            steps += 1
            return super().__getitem__(i)

    finder = StopStrings(["a" * 5000 + "b"])
    finder._progress[0]._shorter = Counted(finder._progress[0]._shorter)
    out = "".join(finder.add("aaaa")[0] for _ in range(5000))
    assert len(out) == 15_000
    assert steps <= 20_000
