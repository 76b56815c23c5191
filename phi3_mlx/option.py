"""What a user can set: fields of a dataclass that know their default, help, range and type.

The Python functions, the command line, YAML files and the documentation's tables are made of the same fields, so each
of these stands in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .errors import OptionError
from .values import choice, flag, number, shown, text, texts, whole

Option = dataclasses.Field[Any]
DTYPE_NAMES = ("float32", "bfloat16", "float16")  # which types can be chosen


class Range(NamedTuple):
    """Which values are allowed: a test, and how messages and tables say it."""

    holds: Callable[[Any], bool]
    said: str


def option(
    default: Any,
    help_text: str,
    within: Range | None = None,
    *,
    choices: Collection[str] = (),
    offered: Collection[Any] = (),
    read: Callable[[Any, str], Any] | None = None,
    flags: str | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """A field of a dataclass of options.

    `choices` are the texts that are allowed. `read(value, name)` types a value in place of what the annotation says.

    The rest is for the command line. `offered`: the values that it takes, where others are refused elsewhere. `flags`:
    how the option is spelled, "-m --model", if not as the field. `metavar`: the word for its value in the help;
    `shown_default`: what the help says its default is, if not the field's ("": nothing).
    """
    metadata = {
        "help": help_text,
        "within": within,
        "choices": choices,
        "offered": offered or choices,
        "read": read,
        "flags": flags,
        "metavar": metavar,
        "shown_default": shown_default,
    }
    return dataclasses.field(default=default, metadata=metadata)


def option_type(field: Option) -> str:
    """The type of a field's values other than None, as its annotation spells it."""
    return str(field.type).removesuffix(" | None")


def arguments(kind: type, given: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Those of a function's arguments, its `locals()` at the beginning, that are fields of the dataclass `kind`.

    TypeError unless the function takes every field but those named in `without`.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [name for name in names if (name in given) == (name in without)]:
        raise TypeError(f"a function of {kind.__name__} takes every field but {[*without]}; see {', '.join(missing)}")
    return {name: given[name] for name in names if name in given}


def settle(options: Any) -> None:
    """Give each field of a new frozen dataclass of options a value of its type. Raises OptionError; see `check`."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, read(field, getattr(options, field.name), field.name))
    for field in dataclasses.fields(options):
        check(field, getattr(options, field.name))


def read(field: Option, value: Any, where: str) -> Any:
    """`value` as the field has it. OptionError, which begins with `where`, for a value of another type."""
    if value is None and str(field.type).endswith("| None"):
        return None
    reader: Callable[[Any, str], Any] = field.metadata["read"] or _READERS[option_type(field)]
    return reader(value, where)


def check(field: Option, value: Any) -> None:
    """OptionError for a value that is none of the field's choices, or outside its range; None is neither."""
    if value is None:
        return
    choices, within = field.metadata["choices"], field.metadata["within"]
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
