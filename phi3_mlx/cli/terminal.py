"""Everything that the command line writes: answers and tables to stdout, everything else to stderr.

Names of files, configs, tokens, templates and answers may hold control characters, with which a terminal can be told
to change its title, its clipboard or what is on it already. On a terminal they are shown as `\\x1b` and the like; in a
pipe or a file the text stays as it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from ..files import json_text

if TYPE_CHECKING:
    from rich.progress import Progress

_CONTROL_CHARACTERS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")  # C0, DEL and C1 except tab and line end
_CLEAR_LINE = "\r\033[K"


def escape(text: str) -> str:
    """`text` with its control characters spelled out; a line end of Windows is a line end."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def show(text: str = "", end: str = "\n", *, styles: Collection[str] = ()) -> None:
    """To stdout, at once. `styles` are sequences in `text` for the terminal, left out elsewhere."""
    _write(sys.stdout, text + end, styles)


@contextlib.contextmanager
def answer_writer() -> Iterator[Callable[[str], None]]:
    """A function that writes a text to stdout as it comes, on a terminal with line breaks between words."""
    if not sys.stdout.isatty():
        yield lambda text: show(text, end="")
        return
    from .words import WordWrap

    wrap = WordWrap(lambda: shutil.get_terminal_size().columns, escape)
    try:
        yield lambda text: show(wrap.add(text), end="")
    finally:
        show(wrap.end(), end="")


def show_json(value: Any, *, indent: int | None = None) -> None:
    """To stdout as JSON, in ASCII where stdout cannot take all of its characters."""
    text = json_text(value, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=indent)
    show(text)


def say(text: str = "", end: str = "\n") -> None:
    """To stderr, if that is still there: work goes on when its terminal was closed."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, text + end)


def note(sentence: str) -> None:
    """To stderr, what the user should know and need not act on."""
    say(f"note: {sentence}")


def redraw(line: str, end: str = "") -> None:
    """To stderr in place of the terminal's last line."""
    with contextlib.suppress(OSError):
        sys.stderr.write(_CLEAR_LINE)
        _write(sys.stderr, line + end)


def progress_bar(*columns: Any) -> Progress:
    """A progress bar of these columns and the time left, on stderr; what stands in it is `escape`d by the caller."""
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def show_rich(table: Any) -> None:
    """A table of rich, to stdout, without colours."""
    from rich.console import Console

    console = Console(file=sys.stdout, color_system=None)
    with console.capture() as captured:
        console.print(table)
    show(captured.get(), end="")


def take_all_characters() -> None:
    """From now on stdout and stderr write `?` for a character that they lack, where Python would end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _write(stream: TextIO, text: str, styles: Collection[str] = ()) -> None:
    terminal = stream.isatty()
    parts = re.split(f"({'|'.join(map(re.escape, styles))})", text) if styles else [text]
    for part in parts:
        if part not in styles:
            stream.write(escape(part) if terminal else part)
        elif terminal:
            stream.write(part)
    stream.flush()
