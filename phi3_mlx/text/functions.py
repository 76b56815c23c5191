"""What a Python function says of itself, as a tool: name, description, and the JSON schema of its arguments."""

from __future__ import annotations

import functools
import inspect
import re
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
_OTHER_FIELD = re.compile(r":(returns?|rtype|raises?|type|yields?)\b")


def described(function: Callable[..., Any]) -> tuple[str, str, dict[str, Any]]:
    """(name, description, JSON schema of the arguments) of a function with type hints.

    Parameters with a default may be absent. Their descriptions come from `Annotated[int, "text"]`, or from a
    docstring in Google's, NumPy's or Sphinx's form. Raises OptionError, which names the parameter, for what cannot be
    described: no hint, a type without a form in JSON, `*args`, positional-only parameters.
    """
    name = getattr(_bare(function), "__name__", type(function).__name__)
    where = f"tool {name}"
    try:
        parameters = inspect.signature(function).parameters
        hints = typing.get_type_hints(_annotated(function), include_extras=True)
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


def _bare(function: Any) -> Any:
    """What stands behind `functools.partial`."""
    return _bare(function.func) if isinstance(function, functools.partial) else function


def _annotated(function: Any) -> Any:
    """What has the annotations: a function, a method, or the `__call__` of an object."""
    bare = inspect.unwrap(_bare(function))
    return bare if inspect.isroutine(bare) else type(bare).__call__


def _is_plain(value: Any) -> bool:
    return value is None or (type(value) in (str, int, float, bool) and value == value)


def docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what it says of the function, of each parameter by its name), each on one line or in paragraphs.

    Parameters are looked for under a heading `Args:` (Google), `Parameters` with a rule (NumPy), and in fields
    `:param name: text` (Sphinx).
    """
    lines = inspect.cleandoc(text).splitlines()
    about: list[str] = []
    texts: dict[str, list[str]] = {}
    of_parameters, ended, current = False, False, None
    base = 0  # the indentation of the names under a heading
    for number, line in enumerate(lines):
        indent, stripped = len(line) - len(line.lstrip()), line.strip()
        if _RULE.fullmatch(stripped) and (of_parameters or ended):
            continue
        if field := _FIELD.match(stripped):
            current, ended = field[1], True
            texts[current] = [field[2]]
        elif _OTHER_FIELD.match(stripped):
            current, ended = None, True
        elif indent == 0 and _is_heading(_PARAMETERS_HEADING, lines, number):
            of_parameters, ended, current, base = True, False, None, -1
        elif indent == 0 and _is_heading(_OTHER_HEADING, lines, number):
            of_parameters, ended, current = False, True, None
        elif of_parameters and stripped:
            base = indent if base < 0 else base
            entry = re.match(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*(?::\s*(.*))?$", stripped) if indent <= base else None
            if entry:
                current = entry[1]
                # NumPy's form has the type behind the colon, and the text below.
                texts[current] = [] if base == 0 else [entry[2] or ""]
            elif current:
                texts[current].append(stripped)
        elif current and stripped:
            texts[current].append(stripped)
        elif not ended and not of_parameters:
            about.append(line.rstrip())
    joined = {name: " ".join(part for part in parts if part) for name, parts in texts.items()}
    paragraphs = re.split(r"\n\s*\n", "\n".join(about).strip())
    return "\n\n".join(" ".join(part.split()) for part in paragraphs), {k: v for k, v in joined.items() if v}


def _is_heading(pattern: re.Pattern[str], lines: list[str], number: int) -> bool:
    """Whether a line is a heading: it ends in a colon, or has a rule below."""
    line = lines[number].strip()
    if not pattern.fullmatch(line):
        return False
    return line.endswith(":") or (number + 1 < len(lines) and _RULE.fullmatch(lines[number + 1].strip()) is not None)
