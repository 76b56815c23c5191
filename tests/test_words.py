"""On a terminal an answer's lines break between words; in a pipe it is as the model wrote it."""

import io
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from phi3_mlx.cli import terminal
from phi3_mlx.cli.terminal import escape
from phi3_mlx.cli.words import WordWrap

COMMAND = [sys.executable, "-c", "from phi3_mlx.cli import main; main()"]


def wrapped(text, columns, pieces=None):
    wrap = WordWrap(lambda: columns, escape)
    return "".join(map(wrap.add, pieces or [text])) + wrap.end()


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("The cat said", 7, ["The cat", "said"]),
        ("The cat said", 8, ["The cat", "said"]),
        ("The cat said", 6, ["The", "cat", "said"]),
        ("The cat said", 12, ["The cat said"]),
        ("a\n\nb c", 3, ["a", "", "b c"]),
        ("a  b", 3, ["a", "b"]),
        ("    x = 1", 20, ["    x = 1"]),
        ("a \nb", 2, ["a", "b"]),
        ("see https://example.org/long now", 10, ["see", "https://example.org/long now"]),
        ("東京に行く。また", 8, ["東京に行", "く。また"]),
        ("猫 and 犬", 6, ["猫 and", "犬"]),
        ("cafe\u0301 ole\u0301", 4, ["cafe\u0301", "ole\u0301"]),
        ("a 👩\u200d💻!", 4, ["a", "👩\u200d💻!"]),
        ("a\tb c", 9, ["a\tb", "c"]),
        ("x\r\ny", 9, ["x", "y"]),
        ("a \x1b[2J b", 9, ["a \\x1b[2J", "b"]),
        ("", 5, [""]),
        (" ", 5, [""]),
        ("ab", 1, ["ab"]),
    ],
)
def test_lines_break_between_words(text, columns, lines):
    assert wrapped(text, columns).split("\n") == lines
    assert wrapped(text, columns, list(text)).split("\n") == lines  # a character at a time


def test_how_the_text_is_cut_into_pieces_changes_nothing():
    draw = random.Random(0)
    letters = ["a", "bc", "def ", " ", "\n", "猫", "。", "é", "\t", "👍", "-", "(", "long" * 9]
    for _ in range(300):
        text = "".join(draw.choices(letters, k=40))
        columns = draw.randint(1, 20)
        pieces, rest = [], text
        while rest:
            size = draw.randint(1, 6)
            pieces.append(rest[:size])
            rest = rest[size:]
        whole = wrapped(text, columns)
        assert wrapped(text, columns, pieces) == whole, (text, columns, pieces)
        assert "".join(whole.split()) == "".join(text.split())  # no character is lost, none is added
        for line in whole.split("\n"):
            first = re.match(r"\s*\S*", line)[0].expandtabs()
            if line.isascii() and "long" not in line and len(first) <= columns:  # else the terminal breaks it itself
                assert len(line.expandtabs()) <= columns, (text, columns)


def test_a_word_is_shown_as_soon_as_its_end_is_known_and_a_long_one_before():
    wrap = WordWrap(lambda: 10)
    assert [wrap.add(piece) for piece in ("The", " ca", "t s")] == ["", "The", " cat"]
    assert wrap.add("x" * 20) == "\n" + "s" + "x" * 20
    assert wrap.add("xx y z") == "xx y"
    assert wrap.end() == " z"
    assert wrap.end() == ""


def test_a_window_that_is_resized_is_followed():
    columns = 20
    wrap = WordWrap(lambda: columns)
    assert wrap.add("one two three ") == "one two three"
    columns = 8
    assert wrap.add("four five six ") == "\nfour\nfive six"


def test_in_a_pipe_the_text_is_as_it_is(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "5")
    with terminal.answer_writer() as write:
        for piece in ("The ca", "t  said\r\n", "\x1b[1m "):
            write(piece)
    assert out.getvalue() == "The cat  said\r\n\x1b[1m "


def test_what_was_held_back_is_shown_where_an_answer_is_stopped(monkeypatch):
    out = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "8")

    def stopped():
        with terminal.answer_writer() as write:
            write("The cat said")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert out.getvalue() == "The cat\nsaid"


def test_generate_and_chat_break_lines_between_words_on_a_terminal():
    import pty

    ask = "Tell me a story about a duck and a frog."
    story = subprocess.run(
        [*COMMAND, "generate", "-p", ask, "--max-tokens", "60"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "30"},
        check=True,
    ).stdout
    assert max(map(len, story.splitlines())) > 100
    for words, typed in (
        (["generate", "-p", ask, "--max-tokens", "60"], b""),
        (["chat", "--max-tokens", "60"], f"{ask}\n".encode()),
    ):
        parent, screen = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "30"}
        done = subprocess.run([*COMMAND, *words], input=typed, stdout=screen, stderr=subprocess.PIPE, env=environment)
        assert done.returncode == 0, done.stderr
        lines = os.read(parent, 65536).decode().replace("\r\n", "\n").split("\n")
        os.close(screen)
        os.close(parent)
        assert max(map(len, lines)) <= 30
        assert " ".join(" ".join(lines).split()) == " ".join(story.split())
