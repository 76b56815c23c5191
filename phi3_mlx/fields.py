"""Values out of JSON that anybody may have written: parsed within limits, and taken by type.

Python's own reader takes NaN, keys given twice, half characters and numbers of a thousand digits, and what it made of
them fails far from the file that is to blame.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import Phi3Error

DEEPEST = 64  # objects and lists within each other
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character beyond U+FFFF
_OF_FLOATS = {*".eE"}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8


def parse(text: str, *, strict: bool = False) -> Any:
    """The value of a JSON text. A whole number beyond 64 bits becomes a float.

    Raises ValueError, its message a reason to put into a sentence, for what is no JSON, nested deeper than `DEEPEST`,
    or has a key given twice with different values, or half a character that stands for no byte of a file's name.
    `strict` refuses all that cannot be written as JSON again: NaN, numbers too large for a float, half characters.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_finite if strict else _number,
            parse_float=_finite if strict else float,
            parse_constant=_no_number if strict else float,
        )
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    _check_depth(value)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8", "strict" if strict else "surrogateescape")
        except UnicodeEncodeError as error:
            raise ValueError("it has half a character (a lone surrogate)") from error
    return value


class Fields:
    """A JSON object whose values are taken by type; one of another type is `error`, naming file and key.

    `source` is what messages call the file, `within` the keys that lead to this object, `advice` how they end.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        source: str | os.PathLike[str],
        error: type[Phi3Error],
        advice: str = "",
        within: str = "",
    ):
        self.raw, self.source, self._error, self._advice, self._within = raw, source, error, advice, within

    def fail(self, key: str, expected: str) -> NoReturn:
        given = "is missing, expected" if self.raw.get(key) is None else f"is {shorten(self.raw[key])}, expected"
        advice = f"; {self._advice}" if self._advice else ""
        raise self._error(f"{self.source}: {self._within}{shorten(key, quote=False)} {given} {expected}{advice}")

    def all_of(self, *keys: str) -> Fields:
        """Itself, once it has these keys and no other."""
        for key in (*self.raw, *keys):
            if key not in keys:
                self.fail(key, f"no key but {', '.join(keys)}")
            if key not in self.raw:
                self.fail(key, "a value or null")
        return self

    def number(self, key: str, default: float | None = None, *, least: float = -3e38, most: float = 3e38) -> float:
        """A number from `least` to `most`, by default what float32 can hold; `default` where it is absent or null."""
        value = self._of((int, float), key, default, "a number")
        if not least <= value <= most:  # NaN is nowhere
            self.fail(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number from `least` to `most`."""
        value = self._of((int,), key, default, "a whole number")
        if not least <= value <= most:
            self.fail(key, f"a whole number from {least:,} to {most:,}")
        return int(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return bool(self._of((bool,), key, default, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        """A text that can be written as UTF-8."""
        value = self.path(key, default)
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(key, "a text without half a character")
        return value

    def path(self, key: str, default: str | None = None) -> str:
        """A text that may name a file: bytes that are not UTF-8 stand in it as halves of characters."""
        return str(self._of((str,), key, default, "a text"))

    def fields(self, key: str) -> Fields:
        """An object; empty where it is absent or null."""
        value = self._of((dict,), key, {}, "an object")
        return Fields(value, self.source, self._error, self._advice, f"{self._within}{shorten(key, quote=False)}.")

    def _of(self, kinds: tuple[type, ...], key: str, default: Any, expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.fail(key, expected)
            return default
        if type(value) not in kinds:  # `type`: true is no number
            self.fail(key, expected)
        return value


def kind_of(value: Any) -> str:
    """A value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    kinds = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def shorten(value: Any, *, quote: bool = True) -> str:
    """A value as a message shows it: on one line and no longer than it helps. `quote` tells texts from names."""
    if not quote and isinstance(value, str) and value.isprintable() and len(value) <= 120:
        return value
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python converts no number of more than 4,300 digits
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next((key for key, given in pairs if value[key] != given), None)
        if twice is not None:
            raise ValueError(f"the key {shorten(twice)} is given twice, with different values")
    return value


def _number(digits: str) -> int | float:
    """Python makes no whole number of more than 4,300 digits."""
    whole = int(digits) if len(digits) <= 20 else None
    return whole if whole is not None and whole < 2**64 else float(digits)


def _finite(digits: str) -> int | float:
    value = float(digits) if set(digits) & _OF_FLOATS else _number(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shorten(digits, quote=False)} is too large")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
