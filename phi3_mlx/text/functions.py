"""What a Python function says of itself, as a tool: name, description, and the JSON schema of its arguments."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from .schemas import Hints

_PARAMETER_KINDS = inspect.Parameter
_PARAMETERS_HEADING = re.compile(r"(Args|Arguments|Parameters|Params)\s*:?\s*")
_OTHER_HEADING = re.compile(
    r"(Returns?|Yields?|Raises|Examples?|Notes?|See Also|References|Attributes|Warnings?|Other Parameters)\s*:?\s*"
)
_RULE = re.compile(r"-{3,}\s*")
_FIELD = re.compile(r":param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)")
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"(\w+)\s*(?::|$)")
_OTHER_FIELD = re.compile(r":(returns?|rtype|raises?|type|yields?)\b")


def described(function: Callable[..., Any]) -> tuple[str, str, dict[str, Any]]:
    """(name, description, JSON schema of the arguments) of a function with type hints.

    Parameters with a default may be absent. Their descriptions come from `Annotated[int, "text"]`, or from a
    docstring in Google's, NumPy's or Sphinx's form. Raises OptionError, which names the parameter, for what cannot be
    described: no hint, a type without a form in JSON, `*args`, positional-only parameters.
    """
    name = getattr(_bare(function), "__name__", type(function).__name__)
    where = f"tool {name}"
    _check_returns(_called(_bare(function)), where)
    try:
        parameters, hints = inspect.signature(function).parameters, hints_of(function)
    except (NameError, TypeError, ValueError) as error:
        raise OptionError(f"{where}: its type hints cannot be read: {error}") from None
    description, texts = docstring(inspect.getdoc(_bare(function)) or "")
    types = Hints(where)
    properties, required = {}, []
    for parameter in parameters.values():
        if parameter.kind in (
            _PARAMETER_KINDS.VAR_POSITIONAL,
            _PARAMETER_KINDS.VAR_KEYWORD,
            _PARAMETER_KINDS.POSITIONAL_ONLY,
        ):
            raise OptionError(f"{where}: {parameter} cannot be described; give parameters that have a name each")
        if parameter.name not in hints:
            raise OptionError(f"{where}: {parameter.name} has no type hint; give one")
        types.name = f"{where}: {parameter.name}"
        schema = types.schema_of(hints[parameter.name])
        if "description" not in schema and parameter.name in texts:
            schema = {**schema, "description": texts[parameter.name]}
        if parameter.default is _PARAMETER_KINDS.empty:
            required.append(parameter.name)
        elif _is_plain(parameter.default):
            schema = {**schema, "default": parameter.default}
        properties[parameter.name] = schema
    whole = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return name, description, {**whole, "$defs": types.definitions} if types.definitions else whole


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters, also of a method, of an object that can be called, and of a partial."""
    return typing.get_type_hints(_called(inspect.unwrap(_bare(function))), include_extras=True)


def _check_returns(routine: Any, where: str) -> None:
    for kind, word in (
        (inspect.iscoroutinefunction, "coroutine"),
        (inspect.isasyncgenfunction, "generator"),
        (inspect.isgeneratorfunction, "generator"),
    ):
        if kind(routine):
            raise OptionError(f"{where} is a {word} function; give a function that returns its result")


def _called(function: Any) -> Any:
    """The function that runs when an object is called: itself, or its class's `__call__`."""
    return function if inspect.isroutine(function) else type(function).__call__


def _bare(function: Any) -> Any:
    """What stands behind `functools.partial`."""
    return _bare(function.func) if isinstance(function, functools.partial) else function


def _is_plain(value: Any) -> bool:
    return value is None or (type(value) in (str, int, float, bool) and value == value)


def docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what it says of the function, what it says of each parameter), on one line or in paragraphs.

    Parameters are looked for under a heading `Args:` (Google), `Parameters` with a rule (NumPy), and in fields
    `:param name: text` (Sphinx).
    """
    lines = inspect.cleandoc(text).splitlines()
    about: list[str] = []
    parameters: list[str] = []
    fields: list[str] = []
    section = about
    for number, line in enumerate(lines):
        if _is_heading(_PARAMETERS_HEADING, lines, number):
            section = parameters
        elif _is_heading(_OTHER_HEADING, lines, number) or _OTHER_FIELD.match(line):
            section = []
        elif _FIELD.match(line):
            section = fields
            section.append(line)
        else:
            section.append(line)
    paragraphs = re.split(r"\n\s*\n", "\n".join(about).strip())
    return "\n\n".join(map(_one_line, paragraphs)), {**_entries(parameters), **_texts_of(fields, _FIELD)}


def _is_heading(pattern: re.Pattern[str], lines: list[str], number: int) -> bool:
    """Whether a line is a heading: it ends in a colon, or has a rule below."""
    below = lines[number + 1] if number + 1 < len(lines) else ""
    return bool(pattern.fullmatch(lines[number])) and (lines[number].rstrip().endswith(":") or bool(_RULE.match(below)))


def _entries(lines: list[str]) -> dict[str, str]:
    """The texts of a section of parameters. In Google's form it is indented; in NumPy's only the texts are."""
    lines = [line for line in lines if line.strip()]
    numpy = bool(lines) and not lines[0].startswith(" ")
    if not numpy:
        indented = itertools.takewhile(lambda line: line.startswith(" "), lines)
        lines = textwrap.dedent("\n".join(indented)).splitlines()
    return _texts_of(lines, _NUMPY_ENTRY if numpy else _GOOGLE_ENTRY)


def _texts_of(lines: list[str], entry: re.Pattern[str]) -> dict[str, str]:
    """Texts by their names: a line that `entry` matches begins one, (name) or (name, text); others go on with it."""
    texts: dict[str, list[str]] = {}
    for line in lines:
        begin = entry.match(line)
        if begin:
            texts[begin[1]] = [*begin.groups()[1:]]
        elif texts:
            texts[next(reversed(texts))].append(line)
    return {name: _one_line(" ".join(parts)) for name, parts in texts.items() if any(map(str.strip, parts))}


def _one_line(text: str) -> str:
    return " ".join(text.split())
