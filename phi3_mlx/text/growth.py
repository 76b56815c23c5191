"""Upper bounds of how much a chat template's methods and filters make of their arguments, before they are called.

In characters or items. `weigh` gives the length of a value's text.
"""

import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Weigh = Callable[[Any], int]

ITEM = 8  # what an item of a list costs, the list itself, and what is not text
DEEPEST_LISTS = 64  # lists within lists
TEXT = (str, bytes)  # tuples of types: a union of them takes isinstance five times as long


def count(value: Any) -> int:
    """How many items or characters a value has, 0 for what has no length."""
    return len(value) if hasattr(type(value), "__len__") else 0


def _width(_weigh: Weigh, _value: Any, *args: Any, **kwargs: Any) -> int:
    return max((abs(n) for n in _integers([args, kwargs])), default=0)


def _replaced(_weigh: Weigh, value: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    if isinstance(value, bytes):
        return value.count(old) * len(new)
    return str(value).count(str(old)) * len(str(new))


def _cut(_weigh: Weigh, value: Any, sep: Any = None, *_: Any, **__: Any) -> int:
    return ITEM * (len(value) // 2 if sep is None else value.count(sep))


def _joined(weigh: Weigh, value: Any, d: Any = "", *_: Any, **__: Any) -> int:
    """For the filter `value` holds the parts; for the method `value` is the separator."""
    parts, separator = (d, value) if isinstance(value, TEXT) and not isinstance(d, TEXT) else (value, d)
    return weigh(parts) + count(parts) * weigh(separator)


def printf_size(weigh: Weigh, value: Any, *args: Any, **kwargs: Any) -> int:
    """For `value % args`: every field could show all of them, at the widths that are written or given for a `*`."""
    form = value if isinstance(value, str) else repr(value)
    weight = weigh(args) + weigh(kwargs)
    widths = sum(_number(run) for runs in re.findall(r"[%)][#0\- +]*(\d*)(?:\.(\d+))?", form) for run in runs)
    starred = _width(weigh, value, *args, **kwargs)
    return len(form) + form.count("%") * weight + widths + form.count("*") * starred


def _format_size(weigh: Weigh, value: str, *args: Any, **kwargs: Any) -> int:
    """The same for `value.format(...)`."""
    weight = weigh(args) + weigh(kwargs)
    fields = [spec or "" for _, field, spec, _ in string.Formatter().parse(value) if field is not None]
    widths = sum(_number(run) for spec in fields for run in re.findall(r"\d+", spec))
    nested = _width(weigh, value, *args, **kwargs) if any("{" in spec for spec in fields) else 0
    return len(value) + len(fields) * (weight + nested) + widths


def _number(digits: str) -> int:
    return int(digits or 0) if len(digits) <= 12 else 10**12


def _integers(value: Any) -> Iterator[int]:
    """All integers in lists, mappings and texts."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, str):
        yield from map(_number, re.findall(r"\d+", value))
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _integers(part)


def _indented(_weigh: Weigh, value: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return (str(value).count("\n") + 1) * (abs(width) if isinstance(width, int) else len(width))


def _json_size(weigh: Weigh, value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None,
               *_: Any, **__: Any) -> int:  # fmt: skip
    weight = weigh(value)
    wide = 0 if indent is None else abs(indent) if isinstance(indent, int) else len(indent)
    return 6 * weight + weight // ITEM * (wide * DEEPEST_LISTS + (weigh(separators) if separators else 0))


def _quadratic(weigh: Weigh, value: Any, *args: Any, **kwargs: Any) -> int:
    weight = weigh(str(value) if isinstance(value, str) else value)
    return weight * (weight // 1_000 + sum(weigh(part) for part in (*args, *kwargs.values())))


def _rounded(_weigh: Weigh, _value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    return precision * precision


def _summed(weigh: Weigh, value: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, int | float) else weigh(value) * count(value)


def _translated(_weigh: Weigh, value: str, table: Any = (), *_: Any) -> int:
    longest = max((len(to) for to in table.values() if isinstance(to, str)), default=1)
    return len(value) * longest


METHOD_SIZES: dict[str, Callable[..., int]] = {
    "center": _width,
    "ljust": _width,
    "rjust": _width,
    "zfill": _width,
    "to_bytes": _width,
    "expandtabs": lambda weigh, value, tabsize=8: len(value) * abs(tabsize),
    "replace": _replaced,
    "join": _joined,
    "split": _cut,
    "rsplit": _cut,
    "splitlines": _cut,
    "translate": _translated,
    "format": _format_size,
    "format_map": _format_size,
}
FILTERS: dict[str, Callable[..., int]] = {
    "center": _width,
    "batch": lambda weigh, value, linecount, fill_with=None: ITEM * abs(linecount),
    "slice": lambda weigh, value, slices, fill_with=None: ITEM * abs(slices),
    "replace": _replaced,
    "join": _joined,
    "format": printf_size,
    "indent": _indented,
    "tojson": _json_size,
    "round": _rounded,
    "sum": _summed,
    "wordwrap": _quadratic,
    "urlize": _quadratic,
    "striptags": _quadratic,
    "xmlattr": lambda weigh, value, *_, **__: 5 * weigh(value),
    "groupby": lambda weigh, value, *_, **__: 4 * weigh(value),
    "dictsort": lambda weigh, value, *_, **__: 8 * weigh(value),
    "pprint": lambda weigh, value, *_: 50 * weigh(value),
    "sort": lambda weigh, value, *_, **__: 8 * weigh(value),
}
