"""Tables on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Container, Sequence

from .terminal import show


def print_table(lines: Sequence[Sequence[str]], right: Container[int], spare: Sequence[int] = ()) -> None:
    """Lines of cells under each other, two spaces apart; the columns `right` end in one place.

    On a terminal that is too narrow the columns `spare` are left out, one after the other, until it is wide enough.
    """
    widths = {i: max(map(len, column)) for i, column in enumerate(zip(*lines, strict=True))}
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for i in spare:
        if room is not None and sum(widths.values()) + 2 * (len(widths) - 1) > room:
            del widths[i]
    for line in lines:
        cells = [line[i].rjust(width) if i in right else line[i].ljust(width) for i, width in widths.items()]
        show("  ".join(cells).rstrip())
