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
from ..text.schemas import schema_text
from ..text.tools import Tool, ToolChoice, read_choice, read_tools
from ..values import choice, flag, number, shown, whole
from .asked import Defaults
from .faults import ApiError

Treatment = Literal["honoured", "neutral", "noted", "refused"]
Table = Mapping[str, "ApiField"]
_REQUEST = {field.name: field for field in fields(Request)}


@dataclass(frozen=True)
class ApiField:
    """`read(value, name)` types a value that is honoured, and raises OptionError or ApiError. `neutral` are the values
    that change nothing. `sets`: the field of `Request` that it is. `says` is the documentation's."""

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
        message = (
            f"longrope {rule!r} is not supported, only {defaults.longrope!r}: start the server with --longrope {rule}"
        )
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
        name = str(error).split(" ", 1)[0]
        name = "response_format" if name == "schema" else name
        raise ApiError(400, str(error), "invalid_value", name if name in values else None) from None


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
    return ApiError(400, f"{shorten(where, quote=False)} is unknown here{advice}", "unknown_parameter", where)


def _unsupported(field: ApiField, value: Any, where: str) -> ApiError:
    reason = f": {field.says}" if field.says else ""
    if field.treatment == "refused":
        return ApiError(400, f"{where} is not supported{reason}", "unsupported_parameter", where)
    allowed = " or ".join(map(shorten, field.neutral))
    message = f"{where} {shown(value)} is not supported, only {allowed}{reason}"
    return ApiError(400, message, "unsupported_value", where)


# How values of other fields are read.


def _longrope(value: Any, name: str) -> str:
    return choice(value, name, ("auto", "short", "long"))


def objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise OptionError(f"{name} is {shown(value)}; expected a list of objects")
    return value


def an_object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{name} is {shown(value)}; expected an object")
    return value


def whole_from(least: int, most: int) -> Callable[[Any, str], int]:
    """A whole number within bounds."""

    def read(value: Any, name: str) -> int:
        count = whole(value, name)
        if not least <= count <= most:
            raise OptionError(f"{name} {count} is outside its range; give {least} to {most}")
        return count

    return read


def logit_bias(value: Any, name: str) -> dict[int, float]:
    """{"token id": bias}, the bias from -100 to 100."""
    biases = {}
    for token, bias in an_object(value, name).items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise OptionError(f"{name} has the key {shown(token)}; expected token ids")
        biases[int(token)] = number(bias, f"{name}.{token}")
        if not -100 <= biases[int(token)] <= 100:
            raise OptionError(f"{name}.{token} {shown(bias)} is outside its range; give -100 to 100")
    return biases


def the_schema(kind: Mapping[str, Any], where: str) -> str | None:
    """The JSON schema that a `response_format` holds its answer to: None for text."""
    form = kind.get("type")
    if form == "text":
        honoured_values(table_of(*noted("type")), kind, f"{where}.")
        return None
    if form == "json_object":
        honoured_values(table_of(*noted("type")), kind, f"{where}.")
        return '{"type": "object"}'
    if form != "json_schema":
        raise ApiError(
            400,
            f"{where}.type is {shown(form)}; give text, json_object or json_schema",
            "invalid_value",
            f"{where}.type",
        )
    schema = kind.get("schema")
    if not isinstance(schema, dict):
        raise OptionError(f"{where}.schema is {shown(schema)}; expected a JSON schema")
    return schema_text(schema, f"{where}.schema")


STREAM_OPTIONS = table_of(
    honoured("include_usage", flag, "a last chunk with the counts of tokens"),
    neutral("include_obfuscation", False, True),
)


def stream_options(value: Any, name: str) -> Mapping[str, Any]:
    return honoured_values(STREAM_OPTIONS, an_object(value, name), f"{name}.")


def tools(value: Any, name: str) -> tuple[Tool, ...]:
    """Functions that the model may call; OpenAI's own tools are refused by name."""
    given = [{key: part for key, part in tool.items() if part is not None} for tool in objects(value, name)]
    return tuple(read_tools(given, name))


def tool_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a work is told of tools. ApiError for a choice of a tool that was not given."""
    given = values.get("tools", ())
    try:
        chosen: ToolChoice = read_choice(values.get("tool_choice", "auto"), given)
    except OptionError as error:
        raise ApiError(400, str(error), "invalid_value", "tool_choice") from None
    return {"tools": given, "tool_choice": chosen, "parallel_tool_calls": values.get("parallel_tool_calls", True)}


def wants_usage(values: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the counts of tokens. ApiError where there is no stream to end."""
    options = values.get("stream_options")
    if options is not None and not values.get("stream"):
        raise ApiError(400, "stream_options needs stream: true", "invalid_value", "stream_options")
    return bool((options or {}).get("include_usage"))


# Fields that several endpoints have.

SAMPLING = (
    of_request("temperature"),
    of_request("top_p"),
    of_request("top_k"),
    of_request("min_p"),
    of_request("repetition_penalty"),
    of_request("presence_penalty"),
    of_request("frequency_penalty"),
    honoured(
        "logit_bias", logit_bias, "added to the logits of token ids, -100 to 100: -100 excludes one", "logit_bias"
    ),
    of_request("seed"),
    of_request("stop"),
)
TOOLS = (
    honoured("tools", tools, "functions that the model may call; their arguments always fit their schemas"),
    honoured("tool_choice", lambda value, _: value, "`auto`, `none`, `required`, or one function"),
    honoured("parallel_tool_calls", flag, "whether an answer may have several calls"),
)
FORMS = (
    of_request("regex"),
    of_request("grammar"),
    of_request("choices", says="Answer with one of these texts."),
    honoured("longrope", _longrope, "`auto`, `short` or `long`, as the server's `--longrope`"),
)
BOOKKEEPING = (
    neutral("service_tier", "auto", "default"),
    neutral("store", False, says="nothing is stored"),
    *noted(
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
        says="says nothing of the answer",
    ),
)
