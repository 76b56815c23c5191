"""Tools: functions that a model may ask to have called, as OpenAI's JSON describes them or as Python has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError
from ..fields import parse
from ..values import listed, shown, text
from .functions import described, hints_of
from .python_values import as_hinted

# "auto": the model decides; "none": no call; "required": at least one call; else the name of the tool to call.
ToolChoice = str
CHOICES = ("auto", "none", "required")

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_TOOL_FORM = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
_TOOL_KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask to have called.

    `parameters` is the JSON schema of its arguments, an object; without one it takes none. `function` is what
    `Conversation.send` calls with them, if it is a Python function.

    Raises OptionError for a name that is not 1 to 64 letters, digits, `_`, `-` or `.`, and for a schema that is none.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS, hash=False)
    function: Callable[..., Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _TOOL_NAME.fullmatch(self.name):
            raise OptionError(f"a tool has the name {shown(self.name)}; give 1 to 64 letters, digits, '_', '-' or '.'")
        if not isinstance(self.description, str):
            raise OptionError(f"tool {self.name}: description is {shown(self.description)}; expected a text")
        object.__setattr__(self, "parameters", _schema(self.parameters, self.name))

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """The tool that a Python function is: its name, docstring and type hints. Raises OptionError."""
        if not callable(function):
            raise OptionError(f"{shown(function)} is no function; a tool is a Python function or {_TOOL_FORM}")
        return cls(*described(function), function)

    @classmethod
    def read(cls, value: Any) -> Tool:
        """A tool of any form: itself, a Python function, or OpenAI's JSON. Raises OptionError."""
        if isinstance(value, Tool):
            return value
        return _of_json(value) if isinstance(value, Mapping) else cls.of(value)

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns for a call's arguments, which become the types of its hints.

        Raises OptionError if there is no function, ValueError for arguments of other types, and what the function
        raises.
        """
        if self.function is None:
            raise OptionError(f"tool {self.name} has no function to call; it is known by its JSON alone")
        hints = hints_of(self.function)
        return self.function(**{name: as_hinted(value, hints.get(name, Any)) for name, value in arguments.items()})

    @property
    def json(self) -> dict[str, Any]:
        """OpenAI's JSON form."""
        return {"type": "function", "function": self.listing}

    @property
    def listing(self) -> dict[str, Any]:
        """Name, description and parameters, as prompts list a tool."""
        listing = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in listing.items() if value or key != "description"}


def read_tools(value: Any, name: str = "tools") -> list[Tool]:
    """Several tools: a list of Python functions, Tools and OpenAI's JSON forms, or that list as JSON text.

    None is no tool. Raises OptionError for what is none, and for two of the same name.
    """
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError as error:
            raise OptionError(f"{name} is no JSON: {error}") from None
    items = [] if value is None else listed(value)
    if items is None:
        raise OptionError(f"{name} is {shown(value)}; expected a list of Python functions or of {_TOOL_FORM}")
    tools = [Tool.read(item) for item in items]
    names = [tool.name for tool in tools]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise OptionError(f"{name} has two tools named {twice}; a call could not tell them apart")
    return tools


def read_choice(value: Any, tools: Iterable[Tool], name: str = "tool_choice") -> ToolChoice:
    """ "auto", "none", "required" or the name of a tool; OpenAI's object that names one too. Raises OptionError."""
    if isinstance(value, Mapping):
        function = value.get("function", value)
        value = function.get("name") if value.get("type") == "function" and isinstance(function, Mapping) else value
    names = [tool.name for tool in tools]
    if not isinstance(value, str) or value not in (*CHOICES, *names):
        raise OptionError(f"{name} is {shown(value)}; choose {', '.join([*CHOICES, *names])}")
    if value == "required" and not names:
        raise OptionError(f"{name} is 'required', and there are no tools; give tools")
    return value


def _of_json(value: Mapping[str, Any]) -> Tool:
    if "type" not in value and "name" in value:
        value = {"type": "function", "function": value}
    if value.get("type") != "function":
        raise OptionError(
            f"a tool has the type {shown(value.get('type'))}; functions alone are supported: {_TOOL_FORM}"
        )
    if "function" not in value:  # as in OpenAI's Responses
        value = {"type": "function", "function": {key: part for key, part in value.items() if key != "type"}}
    function = value["function"]
    if not isinstance(function, Mapping) or "name" not in function:
        raise OptionError(f"a tool has no name; expected {_TOOL_FORM}")
    for key in [*(key for key in value if key not in ("type", "function")), *(key for key in function)]:
        if key not in _TOOL_KEYS:
            raise OptionError(f"tool {shown(function['name'])} has {shown(key)}, which is no part of {_TOOL_FORM}")
    given = {key: part for key, part in function.items() if part is not None and key != "strict"}
    return Tool(**given)


def _schema(value: Any, name: str) -> Mapping[str, Any]:
    """The parameters as plain data, checked to be the schema of an object."""
    where = f"tool {name}: parameters"
    if not isinstance(value, Mapping):
        raise OptionError(f"{where} is {shown(value)}; expected the JSON schema of an object")
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{where} holds what JSON has no form for: {error}") from None
    schema: dict[str, Any] = json.loads(text(written, where))
    if not schema:
        return _NO_PARAMETERS
    if schema.get("type", "object") != "object":
        raise OptionError(f"{where} has the type {shown(schema['type'])}; arguments are an object")
    return {"type": "object", **schema}
