"""Write the README's figures from bench/results/ and a real run of the demo: nothing in them is typed by hand.

python -m bench.readme [--check]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from . import record

README = Path(__file__).resolve().parent.parent / "README.md"
DEMO = ["generate", "-p", "Write a story about a rabbit who finds a key."]


def demo() -> str:
    """What the demo prints, broken into lines for the page."""
    import textwrap

    command = [sys.executable, "-c", "from phi3_mlx.cli import main; main()", *DEMO]
    story = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    lines = [line for paragraph in story.splitlines() for line in textwrap.wrap(paragraph, 100) or [""]]
    return "\n".join(["```text", *lines, "```"])


def parity() -> str:
    from .parity import markdown

    return markdown(read("parity"))


def speed() -> str:
    start, decode = read("coldstart"), read("decode")
    seconds = {row["command"]: row["seconds"] for row in start["rows"]}
    rates = {row["package"]: row["tokens_per_second"] for row in decode["rows"]}
    table = [
        "| | phi3-mlx | mlx-lm | ratio |",
        "|---|---|---|---|",
        f"| cold start to the first token, bundled model | {shown(seconds['phi3-mlx'], 's')} | "
        f"{shown(seconds['mlx-lm'], 's')} | {start['ratio']:.2f}× |",
        f"| decode on the CPU, 4-bit, bfloat16 scales, {decode['layers']} layers of Phi-3-mini's shape | "
        f"{shown(rates['phi3-mlx'], 'tok/s')} | {shown(rates['mlx-lm'], 'tok/s')} | {decode['ratio']:.1f}× |",
        "",
        f"Medians (least to most); {start['machine']}; {versions(start)}. `{start['command']}` ({start['date']}), "
        f"`{decode['command']}` ({decode['date']}).",
    ]
    return "\n".join(table)


BLOCKS = {"demo": demo, "parity": parity, "speed": speed}


def read(name: str) -> dict[str, Any]:
    return json.loads((record.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def shown(figure: dict[str, float], unit: str) -> str:
    return f"{figure['median']:.2f} {unit} ({figure['min']:.2f} to {figure['max']:.2f})"


def versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())


def filled(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between each pair of markers replaced."""
    for name, body in blocks.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise click.ClickException(f"README.md must have {opening.strip()} and {closing} once each")
        before, rest = text.split(opening)
        text = f"{before}{opening}{body}\n{closing}{rest.split(closing)[1]}"
    return text


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say whether it is up to date.")
def main(check: bool) -> None:
    text = README.read_text(encoding="utf-8")
    new = filled(text, {name: make() for name, make in BLOCKS.items()})
    if check and new != text:
        raise click.ClickException("README.md is out of date; run python -m bench.readme")
    if not check:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
