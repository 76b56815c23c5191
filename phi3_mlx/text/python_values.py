"""From JSON to Python and back: a tool's arguments as its type hints have them, and its result as a text."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .schemas import required_fields, value_of


def as_hinted(value: Any, hint: Any) -> Any:
    """A value of JSON as `hint` has it: enums, dataclasses, tuples and pydantic models in place of plain data.

    Raises ValueError for a value of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        return _member(value, arguments)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, arguments)
    if isinstance(hint, type) and not origin and hint not in _COLLECTIONS:
        return _of_class(value, hint)
    if origin and origin not in _COLLECTIONS:  # Annotated, Required and the like
        return as_hinted(value, arguments[0])
    return _container(value, origin or hint, arguments)


_COLLECTIONS = (list, tuple, dict, Sequence, Mapping)


def _of_class(value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind in (str, int, float, bool, type(None)):
        return _checked(value, kind)
    if issubclass(kind, enum.Enum):
        return _member(value, [*kind])
    if callable(getattr(kind, "model_validate", None)):
        return kind.model_validate(value)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {name: as_hinted(field, hints[name]) for name, field in _checked(value, dict).items() if name in hints}
    missing = [name for name, required in required_fields(kind, hints).items() if required and name not in fields]
    if missing:
        raise ValueError(f"{kind.__name__} has no {missing[0]}")
    return fields if typing.is_typeddict(kind) else kind(**fields)


def _container(value: Any, kind: Any, arguments: tuple[Any, ...]) -> Any:
    if kind in (dict, Mapping):
        inner = arguments[1] if arguments else Any
        return {key: as_hinted(part, inner) for key, part in _checked(value, dict).items()}
    parts = _checked(value, list)
    if kind is tuple and arguments and Ellipsis not in arguments:
        return tuple(as_hinted(part, inner) for part, inner in zip(parts, arguments, strict=True))
    parts = [as_hinted(part, arguments[0] if arguments else Any) for part in parts]
    return tuple(parts) if kind is tuple else parts


def _first_that_fits(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return as_hinted(value, hint)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{value!r} is of none of the types {', '.join(map(str, hints))}")


def _member(value: Any, members: Sequence[Any]) -> Any:
    """The one of `members` of an enum or a `Literal` whose value is this; True is not 1."""
    values = [*map(value_of, members)]
    for allowed, member in zip(values, members, strict=True):
        if type(allowed) is type(value) and allowed == value:
            return member
    raise ValueError(f"{value!r} is none of {', '.join(map(repr, values))}")


def _checked(value: Any, kind: Any) -> Any:
    if type(value) is not (type(None) if kind is None else kind):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def as_result(value: Any) -> str:
    """A tool's result as the model is told it: a text as it is, anything else as JSON.

    Dataclasses, enums, sets and pydantic models are JSON too. Raises ValueError or TypeError for what has no form in
    JSON.
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plainly)


def _plainly(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return [*value]
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # an array
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")
