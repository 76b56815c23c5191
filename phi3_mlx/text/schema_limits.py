"""Where llguidance takes a JSON schema to say something else: what is refused, and what is said another way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from ..fields import shorten

_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # keywords that hold schemas by name
_DATA = ("const", "enum", "default", "examples")  # keywords that hold values

# It reads numbers as float64, without care for the last digit of those that have many.
_EXACT = 1 << 53
_EXPONENT = 22
_DIGITS = 15
_LARGEST, _REFUSED = 9 * 10**18, 10**19  # its ranges are of 64 bits
_LEAST_VALUE, _MOST_VALUE = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")

# The largest multiple, without zeros at its end, that it can tell within a second: it counts remainders.
LARGEST_MULTIPLE = 50_000
_JOINING = ("allOf", "anyOf", "oneOf", "$ref")  # keywords that make one number a multiple of several

# Characters of JSON texts that it leaves out, because it may not spell them as \u0000.
_UNSPELLED = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")

# February has 29 days in every year for it, and each minute a second 60; Python's years begin at 1.
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(?:\d{3}[1-9]|\d\d[1-9]\d|\d[1-9]\d\d|[1-9]\d{3})"
_DAY = rf"(?:{_YEAR}-(?:(?:0[13-9]|1[0-2])-\d\d|02-(?:[01]\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
_TIME = r"\d\d:\d\d:[0-5]"
_REAL = {"date": f"^{_DAY}", "date-time": f"^{_DAY}.{_TIME}", "time": f"^{_TIME}"}


def fault_of(schema: Any) -> str:
    """What of a schema cannot be constrained, as the end of a sentence; "" if nothing is known of."""
    for part in _subschemas(schema):
        if _counts_twice(part):
            return (
                'has "minProperties" above the number of required properties, which cannot be constrained; leave it out'
            )
        for keyword in ("const", "enum"):
            if value := next(filter(_is_changed, _scalars(part.get(keyword))), None):
                return f'has "{keyword}" with {json.dumps(value)}, which cannot be constrained exactly; leave it out'
    if (multiple := _largest_multiple(schema)) > LARGEST_MULTIPLE:
        told = shorten(str(multiple), quote=False)
        most = f"at most {LARGEST_MULTIPLE:,} can be followed"
        return f'has "multipleOf" of {told}, zeros at its end aside, and {most}; leave it out'
    return ""


def schemas_in(grammar: str) -> Iterator[Any]:
    """The JSON schemas in a grammar in llguidance's form of Lark."""
    for begin in re.finditer(r"%json\s*", grammar):
        try:
            yield json.JSONDecoder().raw_decode(grammar, begin.end())[0]
        except (ValueError, RecursionError):  # which the library tells better, or a text that has "%json" in it
            continue


def as_followed(schema: Any) -> Any:
    """A schema that llguidance follows as the standard has it: whose answers are some of the schema's.

    Dates and times are those that a calendar and a clock have, and limits of numbers are exact.
    """
    if isinstance(schema, list):
        return [as_followed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    followed = {key: _as_followed(key, value) for key, value in schema.items()}
    kind, others = schema.get("format"), followed.get("allOf", [])
    if isinstance(kind, str) and kind in _REAL and isinstance(others, list):
        followed["allOf"] = [*others, {"pattern": _REAL[kind]}]
    return followed


def _as_followed(keyword: str, value: Any) -> Any:
    if keyword in _MAPS and isinstance(value, dict):
        return {name: as_followed(part) for name, part in value.items()}
    if keyword in (*_LEAST_VALUE, *_MOST_VALUE) and type(value) in (int, float):
        return _inward(value, up=keyword in _LEAST_VALUE)
    return value if keyword in _DATA else as_followed(value)


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all in it."""
    if isinstance(schema, list):
        for part in schema:
            yield from _subschemas(part)
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            yield from _subschemas([*value.values()])
        elif keyword not in _DATA:
            yield from _subschemas(value)


def _counts_twice(schema: dict[str, Any]) -> bool:
    """Whether it counts properties that may come twice, which a grammar cannot tell apart."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if not isinstance(least, int | float) or not isinstance(required, list):
        return False
    return least > max(1, len({*map(str, required)}))


def _largest_multiple(schema: Any) -> int:
    """The largest number, without point and zeros at its end, that a number must be a multiple of; 1 without any."""
    parts = [*_subschemas(schema)]
    given: list[Any] = [part.get("multipleOf") for part in parts]
    numbers = {Decimal(repr(value)) for value in given if type(value) in (int, float) and 0 < value < math.inf}
    if not any(keyword in part for part in parts for keyword in _JOINING):
        return max(map(_without_zeros, map(_digits, numbers)), default=1)
    least = min((int(number.as_tuple().exponent) for number in numbers), default=0)
    together = 1
    for number in numbers:
        together = math.lcm(together, _digits(number) * 10 ** (int(number.as_tuple().exponent) - least))
        if _without_zeros(together) > LARGEST_MULTIPLE:
            break
    return _without_zeros(together)


def _digits(number: Decimal) -> int:
    return int("".join(map(str, number.as_tuple().digits)))


def _without_zeros(number: int) -> int:
    return int(str(number).rstrip("0"))


def _scalars(value: Any) -> Iterator[Any]:
    """The texts and numbers in a value; keys are spelled as they are."""
    if isinstance(value, list | dict):
        for part in value if isinstance(value, list) else value.values():
            yield from _scalars(part)
    else:
        yield value


def _is_changed(value: Any) -> bool:
    """Whether a text or number would be written as another one."""
    if isinstance(value, str):
        return _UNSPELLED.search(value) is not None
    if type(value) is not float:
        return type(value) is int and abs(value) > _EXACT
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    return int("".join(map(str, digits))) > _EXACT or abs(int(exponent)) > _EXPONENT


def _inward(limit: float, *, up: bool) -> float:
    """The next number, `up` or down, that stays what it is; a whole one where it is large."""
    if abs(limit) <= _EXACT:
        context = Context(prec=_DIGITS, rounding=ROUND_CEILING if up else ROUND_FLOOR)
        return limit if isinstance(limit, int) else float(context.create_decimal(repr(limit)))
    limit = max(limit, -_LARGEST) if up else min(limit, _LARGEST)
    nearest = float(max(-_REFUSED, min(limit, _REFUSED)))
    if nearest < limit if up else nearest > limit:
        nearest = math.nextafter(nearest, math.inf if up else -math.inf)
    return int(nearest)
