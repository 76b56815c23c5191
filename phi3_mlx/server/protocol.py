"""The fields that a request may have: one table an endpoint, one way to read a value, nothing ignored in silence.

A field is *honoured*; or it is *neutral*: accepted with the values that change nothing; or *noted*: accepted with any
value, because it says nothing of the answer; or *refused* by name, as is every field that no table has. `null` means
that a field was left out. The tables in docs/server.md are made of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .. import option
from ..errors import OptionError
from ..fields import shorten
from ..generation.request import Request
from ..values import shown
from .asked import Defaults
from .faults import ApiError, field_named

Treatment = Literal["honoured", "neutral", "noted", "refused"]
Table = Mapping[str, "ApiField"]
_REQUEST = {field.name: field for field in fields(Request)}


@dataclass(frozen=True)
class ApiField:
    """A field that a request may have, and how it is treated.

    `read(value, name)` types a value that is honoured, and raises OptionError or ApiError. `neutral` are the values
    that change nothing. `sets`: the field of `Request` that it is. `says` is the documentation's.
    """

    name: str
    treatment: Treatment
    says: str
    read: Callable[[Any, str], Any] | None = None
    neutral: tuple[Any, ...] = ()
    sets: str | None = None


def honoured(name: str, read: Callable[[Any, str], Any], says: str, sets: str | None = None) -> ApiField:
    return ApiField(name, "honoured", says, read, sets=sets)


def of_request(name: str, field: str | None = None, says: str = "") -> ApiField:
    """One that is a field of `Request`, with its type and range."""
    known = _REQUEST[field or name]

    def read(value: Any, where: str) -> Any:
        typed = option.read(known, value, where)
        option.check(known, typed)
        return typed

    return ApiField(name, "honoured", says or known.metadata["help"], read, sets=known.name)


def neutral(name: str, *values: Any, says: str = "") -> ApiField:
    return ApiField(name, "neutral", says, neutral=values)


def noted(*names: str, says: str = "") -> list[ApiField]:
    return [ApiField(name, "noted", says) for name in names]


def refused(*names: str, says: str = "") -> list[ApiField]:
    return [ApiField(name, "refused", says) for name in names]


def table_of(*rows: ApiField) -> dict[str, ApiField]:
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "a field has two rows"
    return table


def honoured_values(table: Table, given: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """The typed values of the fields that are honoured and given.

    `within` leads to the object, "messages[0].". Raises ApiError, which names the field, for every other fault.
    """
    values = {}
    for name, value in given.items():
        where = f"{within}{name}"
        field = table.get(name)
        if field is None:
            raise _unknown(where, name, table)
        if value is None or field.treatment == "noted":
            continue
        if field.treatment == "honoured":
            assert field.read is not None
            values[name] = _typed(field, value, where)
        elif not any(type(value) is type(plain) and value == plain for plain in field.neutral):
            raise _unsupported(field, value, where)
    return values


def needed(values: Mapping[str, Any], *names: str, within: str = "") -> None:
    """ApiError unless each of these fields was given."""
    for name in names:
        if name not in values:
            where = f"{within}{name}"
            raise ApiError(400, f"{where} is missing", "missing_required_parameter", where)


def request_of(defaults: Defaults, table: Table, values: Mapping[str, Any], **more: Any) -> Request:
    """The default request with the values that are fields of `Request`, and `more`.

    Raises ApiError for two that exclude each other, and for another rule of LongRoPE than the server's.
    """
    rule = values.get("longrope", defaults.longrope)
    if rule != defaults.longrope:
        message = f"this server's longrope is {defaults.longrope}; for {rule} start one with --longrope {rule}"
        raise ApiError(400, message, "unsupported_value", "longrope")
    settings: dict[str, Any] = {}
    for name, value in values.items():
        field = table[name].sets
        if field is None:
            continue
        if settings.setdefault(field, value) != value:
            raise ApiError(400, f"{name} says something else than {field}; give one of the two", "invalid_value", name)
    try:
        return replace(defaults.request, **settings, **more)
    except OptionError as error:
        raise ApiError(400, str(error), "invalid_value", field_named(str(error))) from None


def _typed(field: ApiField, value: Any, where: str) -> Any:
    assert field.read is not None
    try:
        return field.read(value, where)
    except OptionError as error:
        message = str(error)
        code = "invalid_type" if "; expected " in message else "invalid_value"
        raise ApiError(400, message, code, where) from None


def _unknown(where: str, name: str, table: Table) -> ApiError:
    near = difflib.get_close_matches(name, table, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    where = shorten(where, quote=False)
    return ApiError(400, f"{where} is unknown here{advice}", "unknown_parameter", where)


def _unsupported(field: ApiField, value: Any, where: str) -> ApiError:
    reason = f": {field.says}" if field.says else ""
    if field.treatment == "refused":
        return ApiError(400, f"{where} is not supported{reason}", "unsupported_parameter", where)
    allowed = " or ".join(map(shorten, field.neutral))
    message = f"{where} {shown(value)} is not supported, only {allowed}{reason}"
    return ApiError(400, message, "unsupported_value", where)


def objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise OptionError(f"{name} is {shown(value)}; expected a list of objects")
    return value


def an_object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{name} is {shown(value)}; expected an object")
    return value
