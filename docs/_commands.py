"""Fills commands.md with what `phi3-mlx COMMAND -h` prints, whenever the documentation is built."""

from __future__ import annotations

from typing import Any

import click

_MARKER = "<!-- commands -->"
_WIDTH = 100


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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return markdown.replace(_MARKER, reference()) if page.file.src_uri == "commands.md" else markdown
