"""What a user can set: fields of a dataclass that know their default, help, range and type.

The Python functions, the command line, YAML files and the documentation's tables are made of the same fields, so each
of these stands in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import OptionError
from .values import choice, flag, number, shown, text, texts, whole

Option = dataclasses.Field[Any]


class Range(NamedTuple):
    """Which values are allowed: a test, and how messages and tables say it."""

    holds: Callable[[Any], bool]
    said: str


def option(default: Any, help_text: str, within: Range | None = None, **more: Any) -> Any:
    """A field of a dataclass of options.

    `more` may have `choices`, the texts that are allowed, and `read(value, name)`, which types a value in place of what
    the annotation says.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "within": within, **more})


def option_type(field: Option) -> str:
    """The type of a field's values other than None, as its annotation spells it."""
    return str(field.type).removesuffix(" | None")


def read(field: Option, value: Any, where: str) -> Any:
    """`value` as the field has it. OptionError, which begins with `where`, for a value of another type."""
    if value is None and str(field.type).endswith("| None"):
        return None
    reader: Callable[[Any, str], Any] = field.metadata.get("read") or _READERS[option_type(field)]
    return reader(value, where)


def check(field: Option, value: Any) -> None:
    """OptionError for a value that is none of the field's choices, or outside its range; None is neither."""
    if value is None:
        return
    choices, within = field.metadata.get("choices"), field.metadata["within"]
    if choices:
        choice(value, field.name, choices)
    if within and not within.holds(value):
        raise OptionError(f"{field.name} {shown(value)} is outside its range; give {within.said}")


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "int": whole,
    "float": number,
    "bool": flag,
    "str": text,
    "tuple[str, ...]": texts,
}
