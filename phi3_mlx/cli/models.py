"""phi3-mlx models"""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def models(as_json: bool) -> None:
    """List the models known by a short name, and what is on this disk.

    A name in the first column works wherever a command takes -m; so does any directory or Hugging Face repository of
    a Phi-3 model. What is not on this disk is downloaded on first use.
    """
    from ..hub import list_models
    from ..memory import size_text

    rows = list_models()
    if as_json:
        named = [dataclasses.asdict(row) | {"path": str(row.path) if row.path else None} for row in rows]
        click.echo(json.dumps(named, indent=2))
        return
    table = [("NAME", "REPOSITORY", "BITS", "SIZE", "CONTEXT", "ON DISK")]
    for row in rows:
        place = "bundled" if row.name == "tiny" else "yes" if row.path else ""
        table.append((row.name, row.repo_id or "", str(row.bits), size_text(row.bytes), f"{row.context:,}", place))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
