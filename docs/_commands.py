"""Write commands.md: what `phi3-mlx COMMAND -h` prints.

python docs/_commands.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PAGE = Path(__file__).with_name("commands.md")
_MARKER = "<!-- What follows is written by docs/_commands.py. -->\n"
_WIDTH = 80


def help_pages(command: click.Command | None = None, path: str = "phi3-mlx") -> dict[str, str]:
    """What each command prints with -h, by its whole name, the first one's own first."""
    if command is None:
        from phi3_mlx.cli import cli as command
    # Click leaves two columns free of a terminal as wide as that.
    settings: dict[str, Any] = {
        "max_content_width": _WIDTH,
        "terminal_width": _WIDTH - 2,
        "help_option_names": ["-h", "--help"],
    }
    context = click.Context(command, info_name=path, **settings)
    pages = {path: command.get_help(context)}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            pages |= help_pages(inner, f"{path} {name}")
    return pages


def reference() -> str:
    """All help pages as Markdown."""
    parts = []
    for name, text in help_pages().items():
        level = "##" if name.count(" ") < 2 else "###"
        parts.append(f"{level} {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def with_help(text: str) -> str:
    """The text of commands.md with the help pages of today."""
    return f"{text.split(_MARKER)[0]}{_MARKER}\n{reference()}\n"


if __name__ == "__main__":
    PAGE.write_text(with_help(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
