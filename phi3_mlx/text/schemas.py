"""JSON schemas of what a user has: a dict, a text, a pydantic model or a dataclass."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError
from ..fields import parse
from ..values import shown, text

Schema = Mapping[str, Any] | str | type
_SCHEMA_EXPECTED = "a JSON schema as a dict or a text, a pydantic model or a dataclass"
# What a field of a TypedDict may be marked with, from Python 3.11 on: whether it must be given.
_REQUIREMENTS = {
    getattr(typing, mark): must for mark, must in (("Required", True), ("NotRequired", False)) if hasattr(typing, mark)
}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_text(value: Any, name: str) -> str:
    """The JSON schema of `value`, on one line. Raises OptionError, with the place, for what is none."""
    if isinstance(value, str):
        schema = _parsed(text(value, name), name)
    elif isinstance(value, type) and callable(getattr(value, "model_json_schema", None)):
        try:
            schema = value.model_json_schema()  # type: ignore[attr-defined]
        except Exception as error:  # pydantic's own, of which there are many
            raise OptionError(f"{name}: {value.__name__} has no JSON schema: {str(error).splitlines()[0]}") from None
    elif isinstance(value, type) and dataclasses.is_dataclass(value):
        schema = schema_of(value, name)
    else:
        schema = value
    if not isinstance(schema, Mapping):
        raise OptionError(f"{name} is {shown(schema)}; expected {_SCHEMA_EXPECTED}")
    try:
        written = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{name} holds what JSON has no form for: {error}") from None
    _parsed(written, name)  # within the limits of any JSON
    return text(written, name)


def _parsed(written: str, name: str) -> Any:
    try:
        return parse(written)
    except ValueError as error:
        raise OptionError(f"{name} is no JSON: {error}") from None


def schema_of(hint: Any, name: str) -> dict[str, Any]:
    """The JSON schema of a type: scalars, lists, dicts, tuples, unions, literals, enums and dataclasses of them.

    A dataclass, or a TypedDict, is an object of its fields and no others; those with a default may be absent. The
    texts of `Annotated` describe. Raises OptionError.
    """
    reader = Hints(name)
    schema = reader.schema_of(hint)
    return {**schema, "$defs": reader.definitions} if reader.definitions else schema


class Hints:
    """Turns types into schemas; `definitions` are those of the classes met, by the names that references have.

    `name`: what has the types, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self._kinds: list[type] = []
        self.definitions: dict[str, Any] = {}

    def schema_of(self, hint: Any) -> dict[str, Any]:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return {}
        if hint is None:
            return {"type": "null"}
        if origin in (typing.Annotated, *_REQUIREMENTS):
            notes = " ".join(filter(None, map(self._description, arguments[1:])))
            return {**self.schema_of(arguments[0]), **({"description": notes} if notes else {})}
        if origin is typing.Literal:
            return self._enum(hint, arguments)
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.schema_of(argument) for argument in arguments]}
        return self._schema_of_class(hint) if isinstance(hint, type) and not origin else self._container(hint)

    def _description(self, note: Any) -> str:
        """What a note of `Annotated` says: a text, or pydantic's `Field(description=...)`."""
        if getattr(note, "metadata", None) or type(note).__module__ == "annotated_types":
            raise OptionError(f"{self.name} has the limits {note!r}, which a pydantic model alone can have; give one")
        said = note if isinstance(note, str) else getattr(note, "description", None)
        return said if isinstance(said, str) else ""

    def _schema_of_class(self, kind: type) -> dict[str, Any]:
        if kind in _JSON_TYPES:
            return {"type": _JSON_TYPES[kind]}
        if issubclass(kind, enum.Enum):
            return self._enum(kind, [*kind])
        if callable(getattr(kind, "model_json_schema", None)):
            return self._schema_of_model(kind)
        has_fields = dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)
        return self._reference(kind) if has_fields else self._container(kind)

    def _enum(self, hint: Any, members: Sequence[Any]) -> dict[str, Any]:
        values = [*map(value_of, members)]
        if any(type(value) not in _JSON_TYPES for value in values):
            raise OptionError(f"{self.name} has {hint}, whose values are not all texts, numbers, booleans or None")
        return {"enum": values}

    def _schema_of_model(self, kind: Any) -> dict[str, Any]:
        """Of a pydantic model. Models of other modules may have definitions of the same names."""
        schema: dict[str, Any] = kind.model_json_schema()
        if any(self.definitions.get(name, inner) != inner for name, inner in schema.get("$defs", {}).items()):
            first = f"{len(self.definitions)}_"
            schema = kind.model_json_schema(ref_template=f"#/$defs/{first}{{model}}")
            schema["$defs"] = {f"{first}{name}": inner for name, inner in schema["$defs"].items()}
        self.definitions.update(schema.pop("$defs", {}))
        return schema

    def _container(self, hint: Any) -> dict[str, Any]:
        origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        inner = [self.schema_of(argument) for argument in arguments if argument is not Ellipsis]
        if origin is tuple and inner and Ellipsis not in arguments:
            return {"type": "array", "prefixItems": inner, "items": False, "minItems": len(inner)}
        if origin in (list, tuple, Sequence):
            return {"type": "array", "items": inner[0] if inner else {}}
        if origin in (dict, Mapping) and (not arguments or arguments[0] is str):
            return {"type": "object", "additionalProperties": inner[1] if inner else {}}
        raise OptionError(f"{self.name} has a field of type {hint}, which JSON has no form for; give a JSON schema")

    def _reference(self, kind: type) -> dict[str, Any]:
        """A dataclass or TypedDict by its name, so that it may hold itself."""
        if kind not in self._kinds:
            self._kinds.append(kind)
            title = self._title(kind)
            try:
                hints = typing.get_type_hints(kind, include_extras=True)
            except (NameError, TypeError) as error:
                raise OptionError(f"{self.name}: the types of {kind.__name__} cannot be read: {error}") from None
            fields = required_fields(kind, hints)
            self.definitions[title] = {
                "type": "object",
                "properties": {field: self.schema_of(hints[field]) for field in fields},
                "required": [field for field, required in fields.items() if required],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{self._title(kind)}"}

    def _title(self, kind: type) -> str:
        """A name of its own, of characters that a reference may have."""
        return f"{self._kinds.index(kind)}_{re.sub(r'[^A-Za-z0-9]+', '_', kind.__name__)}"


def value_of(member: Any) -> Any:
    """What JSON has for a member of an enum or of a `Literal`."""
    return member.value if isinstance(member, enum.Enum) else member


def required_fields(kind: Any, hints: Mapping[str, Any]) -> dict[str, bool]:
    """The fields of a dataclass or TypedDict, whose types are `hints`, and whether they must be given."""
    if typing.is_typeddict(kind):
        said = {name: _REQUIREMENTS.get(typing.get_origin(hint)) for name, hint in hints.items()}
        return {name: name in kind.__required_keys__ if must is None else must for name, must in said.items()}
    missing = dataclasses.MISSING
    return {
        field.name: field.default is missing and field.default_factory is missing
        for field in dataclasses.fields(kind)
        if field.init
    }
