"""Write the table of python.md: what an answer can be asked for with, of the fields of `Request`.

python docs/_options.py
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

PAGE = Path(__file__).with_name("python.md")
_BEGIN, _END = "<!-- Written by docs/_options.py, from here -->\n", "<!-- to here. -->\n"


def table() -> str:
    """A row a field, in the order of `generate`, as Markdown."""
    from phi3_mlx import generate
    from phi3_mlx.generation.request import Request

    order = [*inspect.signature(generate).parameters]
    rows = ["| argument | type | default | range | what it does |", "|---|---|---|---|---|"]
    for field in sorted(fields(Request), key=lambda field: order.index(field.name)):
        kind = " or ".join(f"`{part}`" for part in str(field.type).split(" | "))
        within = field.metadata["within"]
        cells = (f"`{field.name}`", kind, f"`{field.default}`", within.said if within else "", field.metadata["help"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """The text of python.md with the table of today."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
