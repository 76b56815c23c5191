"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence

import click


def print_table(lines: Sequence[Sequence[str]], right: Container[int]) -> None:
    """Lines of cells under each other, two spaces apart; the columns `right` end in one place."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
