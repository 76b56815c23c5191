"""Write the pages' tables of arguments, of the fields that the functions and the command line are made of.

python docs/_options.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
# Between these lines of a page stands a table.
_PLACE = re.compile(r"(<!-- Written by docs/_options.py, of (\w+), from here -->\n).*?(<!-- to here. -->\n)", re.DOTALL)


def doors() -> dict[type, Callable[..., Any]]:
    """The dataclasses of options that pages have tables of, and the functions whose arguments they are."""
    import phi3_mlx
    from phi3_mlx.conversion.options import ConvertOptions, FuseOptions
    from phi3_mlx.generation.request import Request
    from phi3_mlx.tuning.settings import Settings

    functions = phi3_mlx.generate, phi3_mlx.convert, phi3_mlx.fuse, phi3_mlx.tune
    return dict(zip((Request, ConvertOptions, FuseOptions, Settings), functions, strict=True))


def table(kind: type, function: Callable[..., Any]) -> str:
    """A row a field, as Markdown, in the order of the function's arguments."""
    order = [*inspect.signature(function).parameters]
    rows = ["| argument | type | default | range | what it does |", "|---|---|---|---|---|"]
    for field in sorted(fields(kind), key=lambda field: order.index(field.name)):
        known = field.metadata
        annotated = re.sub(r"Literal\[.*?\]", "str", str(field.type))
        spelled = " or ".join(f"`{part}`" for part in annotated.split(" | "))
        within = known["within"].said if known["within"] else ", ".join(f"`{value}`" for value in known["offered"])
        default = f"`{field.default}`" if field.default != "" else "(to be given)"
        cells = (f"`{field.name}`", spelled, default, within, known["help"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """The text of a page with the tables of today."""
    tables = {kind.__name__: table(kind, function) for kind, function in doors().items()}
    return _PLACE.sub(lambda place: f"{place[1]}\n{tables[place[2]]}\n{place[3]}", text)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
