"""What the command line writes: control characters are spelled out on a terminal, and no character ends a run."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_mlx.cli
from phi3_mlx.cli import main, terminal
from phi3_mlx.cli.reading import check_text
from phi3_mlx.errors import PromptError
from phi3_mlx.generation.answers import Chunk

TITLE = "\x1b]0;PWNED\x07\x1b[31mX"
SPELLED = r"\x1b]0;PWNED\x07\x1b[31mX"
FIGURES = (None, 1, 1, 1.0, 1, 1.0, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screens(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Terminals for stdout and stderr."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def answers(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """`generate` answers with these chunks."""
    chunks = [Chunk(text, n, -0.5, *FIGURES) for n, text in enumerate(texts)]
    monkeypatch.setattr("phi3_mlx.generation.answers.Answers.chunks", lambda answers: iter(chunks))


def ran(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


# -------------------------------------------------------------------------------------- on a terminal


def test_every_control_character_is_spelled_out():
    for code in [*range(0x20), *range(0x7F, 0xA0)]:
        shown = terminal.escape(f"a{chr(code)}b")
        assert shown == (f"a{chr(code)}b" if chr(code) in "\t\n" else f"a\\x{code:02x}b").replace("\\x0d", "\\r")
    assert terminal.escape("a\r\nb") == "a\nb"
    for text in ("", "naïve 日本語 😀 שלום \u202bאב\u202c\xa0", "line\n\tindented\n"):
        assert terminal.escape(text) == text


def test_all_ways_out_spell_out_what_they_are_given(monkeypatch: pytest.MonkeyPatch):
    out, err = screens(monkeypatch)
    for write in (terminal.show, terminal.say, terminal.note, terminal.redraw):
        write(f"{TITLE}\r\x1b[K")
    terminal.show_json({"a": "\x9b1m"})
    whole = out.getvalue() + err.getvalue()
    assert whole.count(rf"{SPELLED}\r\x1b[K") == 4
    assert whole.count("\x1b") == whole.count("\r\x1b[K") == 1  # the line is cleared for the new one
    assert "\x9b" not in whole


def test_styles_reach_a_terminal_and_no_pipe(monkeypatch: pytest.MonkeyPatch):
    out, _ = screens(monkeypatch)
    terminal.show(f"\x1b[1mbold\x1b[0m {TITLE}", styles=("\x1b[1m", "\x1b[0m"))
    assert out.getvalue() == f"\x1b[1mbold\x1b[0m {SPELLED}\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal.show(f"\x1b[1mbold\x1b[0m {TITLE}", styles=("\x1b[1m", "\x1b[0m"))
    assert sys.stdout.getvalue() == f"bold {TITLE}\n"


def test_tables_of_rich_spell_it_out_too(monkeypatch: pytest.MonkeyPatch):
    from rich.table import Table

    out, _ = screens(monkeypatch)
    table = Table("NAME")
    table.add_row(TITLE)
    terminal.show_rich(table)
    assert "\x1b" not in out.getvalue()
    assert "PWNED" in out.getvalue()


def test_an_answer_is_spelled_out_on_a_terminal_and_kept_in_a_pipe(monkeypatch: pytest.MonkeyPatch):
    out, _ = screens(monkeypatch)
    answers(monkeypatch, "a\x1b", "]0;title\x07", "\rb")
    assert ran("generate", "-p", "x") == 0
    assert out.getvalue() == "a\\x1b]0;title\\x07\\rb\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert ran("generate", "-p", "x") == 0
    assert sys.stdout.getvalue() == "a\x1b]0;title\x07\rb\n"


def test_names_and_errors_are_spelled_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    _, err = screens(monkeypatch)
    folder = tmp_path / f"n{TITLE}m"
    folder.mkdir()
    assert ran("generate", "-m", str(folder), "-p", "x") == 1
    assert ran("generate", "--no-such", TITLE) == 2
    assert ran("chat", TITLE) == 2
    assert "\x1b" not in err.getvalue()
    assert SPELLED in err.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_pseudo_terminal_gets_no_escape_sequence(tmp_path: Path):
    import pty

    folder = tmp_path / f"n{TITLE}m"
    folder.mkdir()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "phi3_mlx", "generate", "-m", str(folder), "-p", "x"]
    done = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # Linux says so at the end
        pass
    assert done.wait() == 1
    os.close(ours)
    assert SPELLED.encode() in seen.replace(b"\r\n", b"")
    assert b"\x1b" not in seen


# ------------------------------------------------------------------------ characters that stdout lacks


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_character_that_stdout_lacks_does_not_end_the_answer(monkeypatch: pytest.MonkeyPatch, encoding: str):
    answers(monkeypatch, "He", "😀", " 日 you")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert ran("generate", "-p", "x") == 0
    assert raw.getvalue() == b"He? ? you\n"


def test_json_loses_no_character_that_stdout_lacks(monkeypatch: pytest.MonkeyPatch):
    answers(monkeypatch, "é😀\x1b")
    for encoding, form in (("latin-1", rb"\u00e9\ud83d\ude00"), ("utf-8", "é😀".encode())):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert ran("generate", "-p", "x", "--json") == 0
        assert form in raw.getvalue()
        assert json.loads(raw.getvalue())["text"] == "é😀\x1b"


def test_a_chosen_way_of_writing_such_characters_is_kept(monkeypatch: pytest.MonkeyPatch):
    """PYTHONIOENCODING=ascii:backslashreplace, say."""
    answers(monkeypatch, "😀")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    assert ran("generate", "-p", "x") == 0
    assert raw.getvalue() == b"\\U0001f600\n"


def test_a_prompt_in_utf_8_is_read_in_the_c_locale():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from phi3_mlx.cli.reading import check_text; print(ascii(check_text(sys.argv[1], '-p')))"
    command = [sys.executable, "-c", code, "naïve 日本".encode()]
    assert (
        subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        == b"'na\\xefve \\u65e5\\u672c'\n"
    )
    with pytest.raises(PromptError, match="not UTF-8 text"):
        check_text("na\udcef", "-p")


def test_help_is_written_in_any_encoding(monkeypatch: pytest.MonkeyPatch):
    for command in ("generate", "tune"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert ran(command, "--help") == 0


def test_messages_to_a_terminal_that_was_closed_do_not_end_the_work(monkeypatch: pytest.MonkeyPatch):
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    terminal.say("x")
    terminal.redraw("x")


# --------------------------------------------------------------------------------------- the one place


def test_nothing_else_of_the_command_line_writes():
    for path in sorted(Path(phi3_mlx.cli.__file__).parent.glob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "click.echo", "click.secho", "Console"), f"{path.name}:{node.lineno}"
            assert not called.endswith(("stdout.write", "stderr.write")), f"{path.name}:{node.lineno}"
