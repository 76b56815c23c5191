"""`phi3-mlx chat --tools`: whose functions run, who is asked first, and what is said on stderr."""

from __future__ import annotations

import functools
import io
import json
import sys

import pytest

from phi3_mlx.cli import main, tools
from phi3_mlx.text import tool_use

pytest.importorskip("llguidance")

FILE = '''
import dataclasses
import beside

@dataclasses.dataclass
class Place:
    inside: bool

def find(place: Place) -> dict[str, str]:
    """Finds what is there."""
    print("ran with", type(place).__name__)
    return {"there": beside.WHAT}

def _helper(x): ...
'''


class Stdin(io.TextIOWrapper):
    """A terminal, or a pipe, that has some lines."""

    def __init__(self, text, tty=False):
        super().__init__(io.BytesIO(text.encode()))
        self.isatty = lambda: tty


@pytest.fixture
def chat(capsys, monkeypatch, tmp_path):
    """chat(*options, stdin="", tty=False) -> (exit code, stdout, stderr, saved messages); the model must call once."""
    monkeypatch.setattr(tool_use, "use_tools", functools.partial(tool_use.use_tools, choice="required", parallel=False))
    (tmp_path / "beside.py").write_text('WHAT = "a duck"')
    (tmp_path / "mine.py").write_text(FILE)
    saved = tmp_path / "saved.json"

    def call(*options, stdin="Look!\n", tty=False, answers=()):
        if tty:  # what is typed at the prompt and what is asked come from input()
            lines = iter([stdin.strip(), *answers, f"/save {saved}"])
            monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/quit"))
        else:
            stdin += f"/save {saved}\n"
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, tty))
        with pytest.raises(SystemExit) as left:
            main(["chat", "--max-tokens", "80", *map(str, options)])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err, json.loads(saved.read_text()) if saved.exists() else None

    call.directory = tmp_path
    yield call
    for name in [name for name in sys.modules if name.startswith("phi3_mlx_tools.")] + ["beside"]:
        sys.modules.pop(name, None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_with_yes_a_function_runs_and_the_call_and_its_result_are_told(chat):
    code, out, err, messages = chat("--tools", chat.directory / "mine.py", "--yes")
    assert code == 0, err
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == '{"there": "a duck"}'
    assert "ran with Place" in out
    assert 'call: find {"place": {"inside": ' in err
    assert 'result: {"there": "a duck"}\n' in err
    assert "this model was not trained for tools" in err


@pytest.mark.parametrize(("said", "runs"), [("y", True), ("YES ", True), ("n", False), ("", False), ("yeah", False)])
def test_at_a_terminal_it_asks_before_each_call(chat, said, runs):
    _, out, err, messages = chat("--tools", chat.directory / "mine.py", tty=True, answers=[said])
    assert "Run find? [y/N] " in err
    assert ("ran with Place" in out) == runs
    assert (messages[2]["content"] == '{"error": "the user did not allow this call"}') == (not runs)


def test_where_nobody_can_be_asked_nothing_runs(chat):
    code, out, err, messages = chat("--tools", chat.directory / "mine.py")
    assert code == 0
    assert "ran with" not in out
    assert "find was not run: nobody can be asked here; --yes runs tools without asking" in err
    assert messages[2]["content"] == '{"error": "the user did not allow this call"}'


def test_calls_of_a_json_file_are_shown_and_end_the_turn(chat):
    (chat.directory / "tools.json").write_text('[{"type": "function", "function": {"name": "go"}}]')
    code, out, err, messages = chat("--tools", chat.directory / "tools.json")
    assert code == 0
    assert "call: go {}" in err
    assert out.strip() == ""
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "go", "arguments": "{}"}


def test_a_function_that_fails_is_told_in_a_line(chat):
    (chat.directory / "bad.py").write_text("def fall() -> str:\n    raise RuntimeError('down')\n")
    code, _, err, messages = chat("--tools", chat.directory / "bad.py", "--yes")
    assert code == 0
    assert "note: the tool fall failed, which the model was told: RuntimeError: down" in err
    assert json.loads(messages[2]["content"]) == {"error": "RuntimeError: down"}


def test_a_long_result_is_shortened_where_it_is_shown_alone(chat):
    (chat.directory / "long.py").write_text("def much() -> str:\n    return 'x' * 150 + 'y' * 100\n")
    _, _, err, messages = chat("--tools", chat.directory / "long.py", "--yes", "--max-tokens", 60)
    assert f"result: {'x' * 150}{'y' * 50}...\n" in err
    assert len(messages[2]["content"]) == 250


def test_all_says_which_functions_are_tools(chat):
    (chat.directory / "some.py").write_text("__all__ = ['a']\ndef a() -> int: ...\ndef b() -> int: ...\n")
    assert [tool.__name__ for tool in tools._tools_of(str(chat.directory / "some.py"))] == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("none.py", "x = 3\n", "has no function; define one with type hints"),
        ("hint.py", "def f(x): ...\n", "tool f: x has no type hint; give one"),
        ("broken.py", "\n1 / 0\n", "broken.py fails in line 2: ZeroDivisionError: division by zero"),
        ("syntax.py", "def (\n", "syntax.py fails: SyntaxError: "),
        ("exits.py", "import sys\nsys.exit(3)\n", "exits.py ends the program when it is read; let it define functions"),
        ("lacks.py", "__all__ = ['lost']\n", "lacks.py has no lost, which its __all__ names"),
        ("number.py", "__all__ = 3\n", "number.py is 3; expected"),
        ("tools.json", "[", "tools.json is no JSON: "),
        ("tools.json", "[]", "tools.json has no function; list one"),
        ("tools.txt", "", "is neither a .py nor a .json file; give one of these"),
        ("missing.py", None, "missing.py is no file; give a .py or a .json file"),
    ],
)
def test_files_that_have_no_tools_are_refused_in_a_line_before_the_model_is_loaded(
    chat, monkeypatch, name, text, fault
):
    if text is not None:
        (chat.directory / name).write_text(text)
    monkeypatch.chdir(chat.directory)
    code, out, err, messages = chat("--tools", name)
    assert code in (1, 2)
    assert fault in err
    assert err.count("\n") == 1
    assert out == ""
    assert messages is None


def test_options_that_do_not_go_with_tools_are_refused(chat):
    assert "--yes has no effect without --tools; leave it out" in chat("--yes")[2]
    err = chat("--tools", chat.directory / "mine.py", "--regex", "a")[2]
    assert err.startswith("phi3-mlx: --regex has no place beside tools")
