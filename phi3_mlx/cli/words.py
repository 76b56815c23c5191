"""Line breaks between words, in a text that comes piece by piece."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

_TAB = 8
_WORDS_AND_SPACES = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_STAYS = (
    "Po",
    "Pe",
    "Pf",
    "Pd",
    "Pc",
    "Sk",
    "Mn",
    "Mc",
    "Me",
    "Cf",
)  # punctuation and marks stay with what they follow
_JOINER = "\u200d"  # makes one emoji of two


class WordWrap:
    """Breaks lines between words, in a terminal of `columns()` columns, asked for each word as windows are resized.

    The last word is held back until its end is certain, since the next piece of text may go on with it. A word longer
    than a line is left to the terminal. Lines also break between wide characters, as Chinese and Japanese write without
    spaces. `shown` is what a terminal shows of a word that may have control characters.
    """

    def __init__(self, columns: Callable[[], int], shown: Callable[[str], str] = str) -> None:
        self._columns, self._shown = columns, shown
        self._column = 0  # where the terminal's cursor is
        self._spaces = ""  # before the next word: written with it, dropped where the line breaks
        self._held = ""
        self._before = ""  # the last character, where the beginning of a long word was written and it may go on

    def add(self, text: str) -> str:
        """What can be written of all text so far, and was not yet."""
        text = (self._held + text).replace("\r\n", "\n")
        certain = list(_units(text))
        self._held = certain.pop() if certain and certain[-1] != "\n" else ""
        written = "".join(map(self._place, certain))
        # A word that fits no line need not wait for its end; spaces do, as the line may break there.
        if self._held.strip(" \t") and _width(self._held) > self._columns():
            self._held, long = "", self._held
            written += self._place(long)
            self._before = long[-1]
        return written

    def end(self) -> str:
        """The rest, where no more text comes."""
        rest, self._held = self._held, ""
        return self._place(rest) if rest else ""

    def _place(self, unit: str) -> str:
        if unit == "\n":
            self._column, self._spaces, self._before = 0, "", ""
            return "\n"
        if unit[0] in " \t":
            self._spaces += unit
            self._before = ""
            return ""
        goes_on, self._before = bool(self._before) and not _may_break(self._before, unit[0]), ""
        unit = self._shown(unit)
        columns = max(self._columns(), 1)
        spaces, self._spaces = self._spaces, ""
        end = _width(spaces + unit, self._column)
        if end > columns and self._column and not goes_on:
            line, end = f"\n{unit}", _width(unit)
        else:
            line = spaces + unit
        self._column = end if end <= columns else (end - 1) % columns + 1  # the terminal broke the line itself
        return line


def _units(text: str) -> Iterator[str]:
    """Line ends, spaces, and words; a word is cut where a line may break beside a wide character."""
    for piece in _WORDS_AND_SPACES.findall(text):
        start = 0
        for i in range(1, len(piece)):
            if _may_break(piece[i - 1], piece[i]):
                yield piece[start:i]
                start = i
        yield piece[start:]


def _may_break(before: str, char: str) -> bool:
    """Whether a line may break between two characters that no space parts."""
    if not (_is_wide(before) or _is_wide(char)):
        return False
    return before != _JOINER and unicodedata.category(char) not in _STAYS


def _is_wide(char: str) -> bool:
    return char > "\u10ff" and unicodedata.east_asian_width(char) in "WF"


def _width(text: str, column: int = 0) -> int:
    """The column where the cursor is after `text`, if it was at `column` before."""
    for char in text:
        if char == "\t":
            column += _TAB - column % _TAB
        elif char.isascii():
            column += 1
        elif unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            column += 2 if _is_wide(char) else 1
    return column
