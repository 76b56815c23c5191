"""Click's options, made of the fields of a dataclass of options, whose home is the library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

import click

from ..option import Option, option_type

F = TypeVar("F", bound=Callable[..., Any])
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool}


def declare(field: Option, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """What Click is told of a field that a user can set: how the option is spelled, and the rest.

    `more`: what one command says instead, such as another default.
    """
    known, kind = field.metadata, option_type(field)
    flags = (known["flags"] or f"--{field.name.replace('_', '-')}").split()
    told: dict[str, Any] = {
        "type": click.Choice(known["offered"]) if known["offered"] else _TYPES.get(kind, str),
        "is_flag": kind == "bool",
        "multiple": kind.endswith(("Sequence[str]", "tuple[str, ...]")),
        "metavar": known["metavar"],
        "default": field.default,
        "help": known["help"],
        **more,
    }
    if default := _shown_default(field, told["default"]):
        if told["default"] is None:  # Click, which knows of none, writes none
            told["help"] += f"  [default: {default}]"
        else:
            told["show_default"] = True
    return [*flags, field.name], told


def _shown_default(field: Option, default: Any) -> str:
    """The default that the help names; "" where it only says that nothing was given, or turned on."""
    if field.metadata["shown_default"] is not None:
        return str(field.metadata["shown_default"])
    default = field.default if default is None else default
    if default in (None, "", False, ()):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def fields_of(kind: type) -> dict[str, Option]:
    """The fields of a dataclass of options, by name."""
    return {field.name: field for field in fields(kind)}


def option_of(field: Option, **more: Any) -> Callable[[F], F]:
    """The option of a field; see `declare`."""
    flags, told = declare(field, **more)
    return click.option(*flags, **told)


def options_of(
    name: str,
    kind: type,
    only: Iterable[str] | None = None,
    *,
    overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    before: Mapping[str, Sequence[Callable[[Any], Any]]] = MappingProxyType({}),
    then: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
) -> Callable[[F], F]:
    """Adds the options of a dataclass, or `only` some; the command gets them as one argument `name`.

    Other options of the command that are fields too are part of it. By field: `overrides` is what the command says
    instead (see `declare`), `before` are other options that the help shows before, and `then` makes a value of what was
    given, once the whole command line is understood.
    """
    known = fields_of(kind)
    options: list[Callable[[Any], Any]] = []
    for field in only or known:
        options += [*before.get(field, ()), option_of(known[field], **overrides.get(field, {}))]

    def decorator(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            values = {field: given.pop(field) for field in known if field in given}
            values |= {field: make(values[field]) for field, make in then.items() if values[field] is not None}
            given[name] = kind(**values)
            return function(*args, **given)

        decorated: Any = command
        for add in reversed(options):
            decorated = add(decorated)
        return decorated

    return decorator
