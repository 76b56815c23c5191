"""Bytes as people write and read them."""

from __future__ import annotations

import re

from .errors import OptionError
from .values import plain, shown

_SMALLEST_MACHINE = 1 << 20


def size_text(size: float) -> str:
    """Bytes as people read them, in powers of 1000: "2.20 GB", "310 MB", "3.4 MB", "12 kB"."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.1f} MB" if size < 99.95e6 else f"{size / 1e6:,.0f} MB"
    return f"{max(size, 0) / 1e3:,.0f} kB"


def parse_size(size: int | str, *, sold: bool = False) -> int:
    """Bytes from a number of them or a text: "2.0GB" and "800M" in powers of 1000, "16GiB" of 1024. OptionError.

    `sold`: of a machine's memory, which is sold in powers of 1024: "16GB" is 2^34. No machine has less than a megabyte.
    """
    size = plain(size)
    text = size if isinstance(size, str) else shown(size)
    # Numbers of more digits are infinite.
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match and float(match[1]):
        if isinstance(size, str) and size.strip() == match[1]:
            number = float(match[1])
            units = f"{number / 1e9:g}GB" if number >= 1e6 else f"{match[1]}GB or {match[1]}MB"
            raise OptionError(f"{shown(size)} has no unit; write {units}")
        unit = (1024 if match[3] or sold else 1000) ** " KMGT".index(match[2].upper() or " ")
        if (count := int(float(match[1]) * unit)) >= (_SMALLEST_MACHINE if sold else 1):
            return count
    raise OptionError(f"{shown(size)} is not a size; give one such as 16GB or 800MB")
