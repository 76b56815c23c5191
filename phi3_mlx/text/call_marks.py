"""Where a list of tool calls begins and ends in an answer, and where one of its objects ends.

An answer comes in pieces. So a text may end within a mark, and then more of it must be waited for.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"

# A pattern is a row of parts: a text stands for one of its characters, None for white space or nothing, and a set for
# one of its texts.
MarkPart = str | None | frozenset[str]
MarkPattern = tuple[MarkPart, ...]
WHITE = " \t\r\n"
_FENCES: tuple[MarkPattern, ...] = ((), (*"```json", None), (*"```", None))
_FENCE_END: MarkPattern = (None, *"```")


@dataclass(frozen=True)
class Mark:
    """What a list of calls (or, if not `listed`, one call) begins with, and what stands right behind it.

    `closings`: what may end it, tried in this order. `trained`: the model's own mark, which ends where it says so.
    """

    begins: MarkPattern
    ahead: MarkPattern = ()
    closings: tuple[MarkPattern, ...] = ()
    listed: bool = True
    trained: bool = False

    def end(self, text: str, *, whole: bool = False) -> int | None:
        """How much of `text` closes the list: 0 if nothing does; None if more of it must come, unless it is `whole`."""
        reached = [_match(closing, text, 0) for closing in self.closings]
        certain = (end for end in reached if end is not None and not (whole and end == "more"))
        end = next(certain, 0)
        return None if end == "more" else end


class Found(NamedTuple):
    """A mark and where it stands. Without a mark, one may begin at `begin`, and more of the text must come."""

    begin: int
    end: int
    mark: Mark | None


class Marks:
    """The marks that an answer may have, and their search. `names` are those of the tools."""

    def __init__(self, names: Collection[str] = ()):
        self._anywhere = [
            Mark((*OPEN,), closings=((None, *CLOSE),), trained=True),
            Mark((*"functools", "[")),
            *(
                Mark(
                    (*fence, "{", None, *'"tool_calls"', None, ":", None, "["),
                    closings=((None, "}", *_FENCE_END), (None, "}")) if fence else ((None, "}"),),
                )
                for fence in _FENCES
            ),
        ]
        quoted = frozenset(f'"{name}"' for name in names)
        keys = frozenset(('"arguments"', '"parameters"'))
        call: MarkPattern = ("{", None, *'"name"', None, ":", None, quoted, None, ",", None, keys, None, ":", None, "{")
        closings = lambda fence: (_FENCE_END,) if fence else ()  # noqa: E731
        self._at_start = [
            mark
            for fence in _FENCES
            for mark in (
                Mark((*fence, "["), (None, *call), closings(fence)),
                Mark(fence, call, closings(fence), listed=False),
            )
        ]

    def find(self, text: str, at_start: bool) -> Found:
        """The first mark in `text`, or where it may be that one begins. `at_start`: the answer begins here."""
        if at_start:
            white = len(text) - len(text.lstrip(WHITE))
            if white == len(text):
                return Found(0, 0, None)
            place = _first(self._at_start, text, white)
            if place:
                return place
        for match in _MAY_BEGIN.finditer(text):
            place = _first(self._anywhere, text, match.start())
            if place:
                return place
        return Found(len(text), len(text), None)


_MAY_BEGIN = re.compile("[<f`{]")


def _first(marks: list[Mark], text: str, begin: int) -> Found | None:
    """The mark that stands here, or that more is needed to know; None if no mark does."""
    waits = False
    for mark in marks:
        end = _match(mark.begins, text, begin)
        if isinstance(end, int):
            reached = _match(mark.ahead, text, end)
            if isinstance(reached, int):
                return Found(begin, end, mark)
            waits = waits or reached == "more"
        waits = waits or end == "more"
    return Found(begin, begin, None) if waits else None


def _match(pattern: MarkPattern, text: str, begin: int) -> int | Literal["more"] | None:
    """Where the pattern ends that begins at `begin`; "more" if the text ends within it; None if it is not there."""
    at = begin
    for part in pattern:
        if part is None:
            at += len(text) - at - len(text[at:].lstrip(WHITE))
        elif at == len(text):
            return "more"
        elif isinstance(part, str):
            if text[at] not in part:
                return None
            at += 1
        else:
            there = next((option for option in part if text.startswith(option, at)), None)
            if there is None:
                return "more" if any(option.startswith(text[at:]) for option in part) else None
            at += len(there)
    return at


class ObjectScanner:
    """Finds where a JSON object ends whose text comes in pieces; `depth`: how many braces are open already."""

    def __init__(self, depth: int = 0):
        self._depth, self._in_text, self._escaped = depth, False, False
        self.ended = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for n, character in enumerate(text):
            if self._in_text:
                self._in_text = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return n + 1
        return len(text)
