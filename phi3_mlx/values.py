"""Values that a user gave, as the plain Python type that they stand for.

Python lets anything through: True counts as 1, a text as a list of its characters, a loaded model as a name. Each
function here returns the value, or raises OptionError ("rank is 'many'; expected a whole number"). A scalar of numpy,
MLX or torch counts as the number that it holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from .errors import OptionError

T = TypeVar("T")
_INTEGER_BITS = 64
_NAME_BYTES, _PATH_BYTES = 255, 4096  # what file systems allow
_SHOWN_CHARACTERS = 60  # characters of a value that a message repeats


def whole(value: Any, name: str) -> int:
    """A whole number that 64 bits hold; True and False are none."""
    python_value = plain(value)
    if isinstance(python_value, int) and not isinstance(python_value, bool):
        if python_value.bit_length() <= _INTEGER_BITS:
            return int(python_value)
        raise refusal(value, name, f"a whole number of at most {_INTEGER_BITS} bits")
    raise refusal(value, name, "a whole number")


def number(value: Any, name: str) -> float:
    """A number, which may be infinite or NaN."""
    python_value = plain(value)
    if isinstance(python_value, int | float) and not isinstance(python_value, bool):
        try:
            return float(python_value)
        except OverflowError:
            pass
    raise refusal(value, name, "a number")


def flag(value: Any, name: str) -> bool:
    """True or False; 0, 1 and "false" are neither."""
    python_value = plain(value)
    if isinstance(python_value, bool):
        return python_value
    raise refusal(value, name, "true or false")


def text(value: Any, name: str) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise refusal(value, name, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"a lone surrogate at {error.start + 1:,}"
        raise OptionError(f"{name} has half a character ({where}); type it again") from error
    return str(value)


def texts(value: Any, name: str) -> tuple[str, ...]:
    """Several texts, of a list, a set or anything else that gives them one by one; a text alone is one."""
    if isinstance(value, str):
        return (text(value, name),)
    items = listed(value)
    if items is None:
        raise refusal(value, name, "a list of texts")
    for item in items:
        if not isinstance(item, str):
            raise OptionError(f"{name} holds {shown(item)}; expected a list of texts")
    return tuple(text(item, name) for item in (sorted(items) if isinstance(value, set | frozenset) else items))


def token_ids(value: Any) -> list[int] | None:
    """Token ids, of a list, a range, or an array of numpy, MLX or torch; None for anything else."""
    items = None if isinstance(value, set | frozenset) else listed(value)
    if items is None:
        return None
    ids = [plain(item) for item in items]
    return ids if all(isinstance(item, int) and not isinstance(item, bool) for item in ids) else None


def listed(value: Any) -> list[Any] | None:
    """What gives several values one by one, or is an array of them; None for texts, bytes, mappings and the rest."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return None
    items = value.tolist() if hasattr(value, "tolist") else value
    return list(items) if isinstance(items, Iterable) else None


def path(value: Any, name: str, expected: str = "a path") -> str:
    """The name of a file or directory: a text or a Path."""
    text_of_path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text_of_path, str):
        raise refusal(value, name, expected)
    if "\0" in text_of_path:
        raise refusal(value, name, f"{expected}, without a null character")
    try:
        parts = os.fsencode(text_of_path).split(os.fsencode(os.sep))
    except UnicodeEncodeError as error:  # a half that stands for no byte
        raise refusal(value, name, f"{expected}, without half a character") from error
    if max(map(len, parts)) > _NAME_BYTES or sum(map(len, parts)) + len(parts) > _PATH_BYTES:
        raise refusal(value, name, f"{expected}; no file has so long a name")
    return str(text_of_path)


def choice(value: Any, name: str, choices: Collection[str]) -> str:
    """One of some texts."""
    if isinstance(value, str) and value in choices:
        return str(value)
    raise OptionError(f"{name} {shown(value)} is unknown; choose {', '.join(choices)}")


def check_function(value: Any, name: str) -> None:
    """OptionError unless it can be called, or is None."""
    if value is not None and not callable(value):
        raise refusal(value, name, "a function")


def check_functions(**given: Any) -> None:
    """The same of several, by their names."""
    for name, value in given.items():
        check_function(value, name)


def optional(read: Callable[[Any, str], T], value: Any, name: str) -> T | None:
    """What `read` makes of the value; None is let be."""
    return None if value is None else read(value, name)


def refusal(value: Any, name: str, expected: str) -> OptionError:
    """That a value is of another type than was expected."""
    return OptionError(f"{name} is {shown(value)}; expected {expected}")


def shown(value: Any) -> str:
    """A value as a message shows it: on one line and short; of what is no scalar, the type alone."""
    if value is None or isinstance(value, str | bytes | int | float | os.PathLike):
        try:
            whole_text = repr(value)
        except ValueError:  # Python writes no int of more than 4,300 digits
            return "a number of thousands of digits"
        return whole_text if len(whole_text) <= _SHOWN_CHARACTERS else f"{whole_text[: _SHOWN_CHARACTERS - 3]}..."
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def plain(value: Any) -> Any:
    """A scalar of an array library as Python's own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
