"""What the command line writes: control characters are spelled out on a terminal, and no character ends a run."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_mlx.cli
from phi3_mlx.cli import main, terminal
from phi3_mlx.cli.progress import ConversionProgress, PrefillProgress, Pulse, QuestionProgress, ReadingProgress
from phi3_mlx.cli.reading import check_text
from phi3_mlx.conversion.sinks import Progress
from phi3_mlx.errors import PromptError
from phi3_mlx.generation.chunks import Chunk

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


@pytest.mark.parametrize("words", [("--regex", "é"), ("--choices", "é"), ("--schema", '{"const": "é"}')], ids=str)
def test_forms_in_utf_8_are_read_in_the_c_locale(words, capfd):
    pytest.importorskip("llguidance")
    as_in_the_c_locale = [word.encode().decode("ascii", "surrogateescape") for word in words]
    assert ran("generate", "-p", "x", "--stop", as_in_the_c_locale[1], "--max-tokens", "9", *as_in_the_c_locale) == 0
    assert ran("generate", "-p", "x", "--max-tokens", "9", *as_in_the_c_locale) == 0
    assert "é" in capfd.readouterr().out


def test_help_is_written_in_any_encoding(monkeypatch: pytest.MonkeyPatch):
    for command in ("generate", "tune"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert ran(command, "--help") == 0


def of_stage(stage: str, done: int) -> Progress:
    return Progress(stage, "tensors", done, 8, done * 10**6, 8 * 10**6)


# Each kind of progress, its reports, and what a terminal then shows of them.
KINDS = [
    (ReadingProgress, [(1024, 2048), (2048, 2048)], ["reading", "1,024 of 2,048 tokens", "2,048 of 2,048 tokens"]),
    (lambda: ReadingProgress("layers"), [(1, 8)], ["1 of 8 layers"]),
    (lambda: QuestionProgress("asking", "texts"), [(1, 8), (2, 8)], ["asking", "1 of 8 texts", "2 of 8 texts"]),
    (lambda: PrefillProgress(4096), [(512, 4096), (4096, 4096)], ["reading the prompt", "512 of 4,096 tokens"]),
    (
        ConversionProgress,
        [(of_stage("packing", 3),), (of_stage("com\x1bparing", 4),)],
        ["loading", "packing", "3 of 8 tensors, 3.0 MB of 8.0 MB", r"com\x1bparing", "4 of 8 tensors"],
    ),
]


@pytest.mark.parametrize(("kind", "reports", "shown"), KINDS, ids=["tokens", "layers", "texts", "prompt", "conversion"])
def test_long_work_has_a_bar_on_a_terminal_and_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, kind, reports, shown):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(Pulse, "SECONDS", 0.0)
    _, err = screens(monkeypatch)
    with kind() as progress:
        for report in reports:
            progress.update(*report)
            if progress._bar.live.is_started:
                progress._bar.refresh()
    assert not progress._bar.live.is_started
    assert [text for text in shown if text not in re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", err.getvalue())] == []
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with kind() as progress:
        for report in reports:
            progress.update(*report)
    lines = log.getvalue().splitlines()
    assert progress._bar is None
    assert lines
    assert all(
        re.fullmatch(r"(read|asking:|packing:|com\x1bparing:) [\d,]+ of [\d,]+ (tokens|layers|texts.*|tensors.*)", x)
        for x in lines
    )


def test_a_stage_that_counts_no_bytes_shows_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(Pulse, "SECONDS", 0.0)
    with ConversionProgress() as progress:
        progress.update(Progress("comparing", "tokens", 1, 2))
    assert capsys.readouterr().err == "comparing: 1 of 2 tokens\n"
    assert Progress("comparing", "tokens", 1, 2).bytes == 0


def test_a_short_prompt_has_no_bar(monkeypatch: pytest.MonkeyPatch):
    screens(monkeypatch)
    with PrefillProgress(2048) as progress:
        assert progress._bar is None


def test_the_bar_of_a_prompt_goes_before_the_answer_begins(monkeypatch: pytest.MonkeyPatch):
    screens(monkeypatch)
    with PrefillProgress(2049) as progress:
        progress.update(2049, 2049)
        assert not progress._bar.live.is_started


def test_models_are_compared_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "text").write_text("Once there was a boy named Tim. " * 4)
    out, err = screens(monkeypatch)
    assert ran("compare", "tiny", "tiny", "--text", str(tmp_path / "text")) == 0
    assert "same likeliest token" in out.getvalue()
    assert "tokens" in err.getvalue()


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
