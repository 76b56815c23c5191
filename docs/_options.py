"""Write the pages' tables of arguments, of the fields that the functions and the command line are made of.

python docs/_options.py
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
# Between these lines of a page stands a table.
_PLACE = re.compile(r"(<!-- Written by docs/_options.py, of (\w+), from here -->\n).*?(<!-- to here. -->\n)", re.DOTALL)
# What a reader gives for each type of an annotation.
_GIVEN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "`True` or `False`",
    "str": "a text",
    "Path": "a path",
    "tuple[int, int]": "a pair of them",
    "tuple[str, ...]": "one or more texts",
    "Sequence[str]": "several texts",
    "Mapping[str, Any]": "a dictionary",
    "Mapping[int, float]": "a dictionary",
    "Schema": "a JSON schema (a dictionary or a text), a pydantic model or a dataclass",
}
# A bound that no sensible value comes near is the message's to name, for who exceeds it.
_FAR = re.compile(r"^(\d+) to (?:[\d,]{10,}|2\*\*64 - 1)")


def doors() -> dict[type, Callable[..., Any]]:
    """The dataclasses of options that pages have tables of, and the functions whose arguments they are."""
    import phi3_mlx
    from phi3_mlx.conversion.options import ConvertOptions, ExportOptions, FuseOptions
    from phi3_mlx.generation.request import Request
    from phi3_mlx.tuning.settings import Settings

    functions = phi3_mlx.generate, phi3_mlx.convert, phi3_mlx.fuse, phi3_mlx.export_gguf, phi3_mlx.tune
    return dict(zip((Request, ConvertOptions, FuseOptions, ExportOptions, Settings), functions, strict=True))


def table(kind: type, function: Callable[..., Any]) -> str:
    """A row a field, as Markdown, in the order of the function's arguments."""
    order = [*inspect.signature(function).parameters]
    rows = ["| argument | give | default | range | what it does |", "|---|---|---|---|---|"]
    for field in sorted(fields(kind), key=lambda field: order.index(field.name)):
        known = field.metadata
        within = known["within"].said if known["within"] else ", ".join(f"`{value}`" for value in known["offered"])
        default = {"": "(to be given)", (): "none"}.get(field.default, f"`{field.default}`")
        cells = (f"`{field.name}`", given_for(str(field.type)), default, _FAR.sub(r"\1 or more", within), known["help"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def given_for(annotation: str) -> str:
    """What a reader gives for a type: "a text or several texts". None is left to the default."""
    parts = re.sub(r"Literal\[.*?\]", "str", annotation).removesuffix(" | None").split(" | ")
    *most, last = dict.fromkeys(_GIVEN[part] for part in parts)
    return f"{', '.join(most)} or {last}" if most else last


def endpoints() -> dict[str, Any]:
    """The fields that each address of the server knows, by the address's last word."""
    from phi3_mlx.server.chat import CHAT_FIELDS
    from phi3_mlx.server.completions import COMPLETION_FIELDS
    from phi3_mlx.server.responses import RESPONSE_FIELDS

    return {"chat": CHAT_FIELDS, "completions": COMPLETION_FIELDS, "responses": RESPONSE_FIELDS}


def field_table(known: Mapping[str, Any]) -> str:
    """A row a field that is honoured; the others in rows of those that are taken alike."""
    rows = ["| field | taken | what it does |", "|---|---|---|"]
    for field in known.values():
        if field.treatment == "honoured":
            rows.append(f"| `{field.name}` | yes | {_sentence(field.says)} |")
    alike: dict[tuple[str, str, str], list[str]] = {}
    for field in known.values():
        if field.treatment != "honoured":
            alike.setdefault((field.treatment, _values(field.neutral), field.says), []).append(f"`{field.name}`")
    for treatment in ("neutral", "noted", "refused"):
        for (same, values, says), names in alike.items():
            if same == treatment:
                taken = {"neutral": f"only {values}", "noted": "yes, without effect", "refused": "no"}[treatment]
                rows.append(f"| {', '.join(names)} | {taken} | {_sentence(says)} |")
    return "\n".join(rows) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}".removesuffix(".") + ("." if text else "")


def _values(values: Iterable[Any]) -> str:
    return " or ".join(f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`" for value in values)


def with_tables(text: str) -> str:
    """The text of a page with the tables of today."""
    tables = {kind.__name__: table(kind, function) for kind, function in doors().items()}
    tables |= {address: field_table(known) for address, known in endpoints().items()}
    return _PLACE.sub(lambda place: f"{place[1]}\n{tables[place[2]]}\n{place[3]}", text)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
