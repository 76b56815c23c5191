"""phi3-mlx models"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import click

_SOURCES = (
    "MMLU: percent, 5-shot, from each model's card. MT-BENCH: technical report, arXiv 2404.14219. 4-BIT: size of the "
    "weights. 16 GB, 32 GB: longest context on such a Mac (phi3-mlx plan)."
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def models(as_json: bool) -> None:
    """Show the family, the models known by a short name, and what is on this disk.

    A name in the first column works wherever a command takes -m; so does any directory or Hugging Face repository of
    a Phi-3 model. What is not on this disk is downloaded on first use.
    """
    from ..family import family_rows
    from ..hub import list_models
    from ..memory import size_text

    family, rows = family_rows(), list_models()
    if as_json:
        named = [dataclasses.asdict(row) | {"path": str(row.path) if row.path else None} for row in rows]
        click.echo(json.dumps({"family": [dataclasses.asdict(row) for row in family], "models": named}, indent=2))
        return
    header = ["FAMILY", "PARAMETERS", "LAYERS", "HEADS", "CONTEXT", "MMLU", "MT-BENCH", "4-BIT", "16 GB", "32 GB"]
    lines = [
        [
            row.name,
            f"{row.parameters / 1e9:.1f}B",
            str(row.layers),
            str(row.heads) if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}",
            f"{row.context:,}",
            "" if row.mmlu is None else f"{row.mmlu:.1f}",
            "" if row.mt_bench is None else f"{row.mt_bench:g}",
            size_text(row.bytes_4bit),
            *(f"{tokens:,}" if tokens else "no" for tokens in row.longest.values()),
        ]
        for row in family
    ]
    _print_table([header, *lines], right=range(1, len(header)))
    click.echo(f"\n{click.wrap_text(_SOURCES, 100)}\n")
    table = [["NAME", "REPOSITORY", "BITS", "SIZE", "CONTEXT", "ON DISK"]]
    for row in rows:
        place = "bundled" if row.name == "tiny" else "yes" if row.path else ""
        table.append([row.name, row.repo_id or "", str(row.bits), size_text(row.bytes), f"{row.context:,}", place])
    _print_table(table, right=range(2, 5))


def _print_table(lines: Sequence[Sequence[str]], right: range) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
