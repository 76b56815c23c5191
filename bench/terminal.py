"""The README's picture of a terminal, from real runs on the bundled model.

    python -m bench.terminal [--check]

Writes docs/terminal.svg. Both commands print the same everywhere: the answer is greedy, and the plan is one for Macs.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import click

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "terminal.svg"
COMMANDS = (
    ("generate", "-p", "Tell me a story about a duck and a frog."),
    ("plan", "-m", "phi-3.5-mini-4bit"),
)
_WIDTH = 104


def run(words: tuple[str, ...]) -> str:
    """What a command prints."""
    environment = {**os.environ, "PYTHONPATH": str(PICTURE.parent.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "phi3_mlx", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def draw() -> str:
    """The SVG of all commands and what they print."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=_WIDTH, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for i, words in enumerate(COMMANDS):
        typed = " ".join(f'"{word}"' if " " in word else word for word in words)
        console.print(Text.assemble(("\n" if i else "") + "$ ", (f"phi3-mlx {typed}", "bold #a6e22e")))
        console.print(Text(run(words)))
    picture = console.export_svg(title="phi3-mlx", theme=MONOKAI, unique_id="terminal")
    # Rich names a font that would be fetched from elsewhere; every system has a monospaced one.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S)
    return re.sub(r"Fira Code,\s*", "Menlo, Consolas, ", picture)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say whether it is up to date.")
def main(check: bool) -> None:
    picture = draw()
    if check and picture != PICTURE.read_text(encoding="utf-8"):
        raise click.ClickException("docs/terminal.svg is out of date; run python -m bench.terminal")
    if not check:
        PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
