"""Tool calls in a model's answer, told apart from its text while the answer is made.

A list of calls begins with one of these, and each call in it is `{"name": ..., "arguments": {...}}`:

- `<|tool_call|>[`, as Phi-4-mini was trained to (`<|/tool_call|>` ends the list);
- `functools[`, as some prompts for Phi-4-mini ask for;
- `{"tool_calls": [`, as models are asked to that were not trained for tools; perhaps in a fence of Markdown;
- `[{"name": "NAME"` or `{"name": "NAME"` at the beginning of the answer, if NAME is a tool: a call without its mark.

What looks like a call and cannot be read, or is cut, is told as broken, with its text as the model wrote it: with the
list's marks, if it is the first of its list.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import NoneType
from typing import Any

from ..fields import kind_of, parse
from .call_marks import CLOSE, WHITE, Mark, Marks, ObjectScanner


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for. `text`: its arguments as the model wrote them, a JSON object."""

    id: str
    name: str
    text: str

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = parse(self.text)
        return arguments

    @property
    def json(self) -> dict[str, Any]:
        """OpenAI's form, as an assistant's message has it."""
        return call_json(self.id, self.name, self.text)


def call_json(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in OpenAI's form; `arguments` is JSON, or the beginning of it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The call number `index`, from 0, begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call is complete."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class CallBroken:
    """What should be a call cannot be read: its text, and why. `index` is that of the call, if it has begun."""

    text: str
    reason: str
    index: int | None = None


CallEvent = TextPiece | CallBegun | ArgumentsPiece | CallEnded | CallBroken


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class ToolCallParser:
    """Tells an answer's text and calls apart, as pieces of the answer come.

    The events do not depend on how the answer is cut into pieces, but for how texts are cut. `names` are those of the
    tools; `make_id` gives each call its id.
    """

    def __init__(self, names: Collection[str] = (), make_id: Callable[[], str] = new_id):
        self._marks, self._make_id = Marks(names), make_id
        self._rest = ""  # what was not told yet
        self._at_start = True
        self._state: Callable[[], bool] = self._in_text  # reads on; False: it needs more of the answer
        self._events: list[CallEvent] = []
        self._mark = Mark(())
        self._call, self._index = ToolCall("", "", ""), -1  # the call that is read, or was last
        self._open = False  # whether it was told to have begun, and not to have ended
        self._opening = ""  # what stands before the first call of a list, until that call is read
        self._item = ""  # of the call, or of what is broken: its text so far
        self._reason = ""
        self._object = ObjectScanner()

    def add(self, text: str) -> list[CallEvent]:
        """What a further piece of the answer makes certain."""
        self._rest += text
        while self._state():
            pass
        return self._told()

    def finish(self) -> list[CallEvent]:
        """What is left at the end of the answer."""
        if self._state == self._in_broken:
            self._tell_broken(self._rest)
        elif self._opening or self._item:
            self._reason = "the answer ends within it"
            self._tell_broken(self._rest)
        else:
            if self._state == self._after_list:
                self._take(self._mark.end(self._rest, whole=True) or 0)
            self._events += [TextPiece(self._rest)] if self._rest else []
        self._rest, self._state = "", self._in_text
        return self._told()

    def _told(self) -> list[CallEvent]:
        events, self._events = self._events, []
        return events

    def _take(self, count: int) -> str:
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    # ------------------------------------------------------------------------------------------- states

    def _in_text(self) -> bool:
        place = self._marks.find(self._rest, self._at_start)
        if text := self._take(place.begin):
            self._events.append(TextPiece(text))
        self._at_start = self._at_start and not text.strip(WHITE)
        if place.mark is None:
            return False
        self._mark = place.mark
        self._opening = self._take(place.end - place.begin)
        return self._go(self._in_list)

    def _in_list(self) -> bool:
        """Before a call, or behind the last."""
        between = self._take(len(self._rest) - len(self._rest.lstrip(WHITE + ",[")))
        self._opening += between if self._opening else ""
        if not self._rest:
            return False
        if self._rest[0] == "{":
            self._object = ObjectScanner()
            return self._go(self._in_call)
        if self._rest[0] == "]" and self._opening:  # a list of no calls is text
            self._events.append(TextPiece(self._opening + self._take(1)))
            self._opening, self._at_start = "", False
            return self._go(self._in_text)
        if self._rest[0] == "]" or (self._rest[0] == "<" and self._mark.trained and not self._opening):
            self._take(self._rest[0] == "]")
            return self._go(self._after_list)
        return self._break("it is no list of calls")

    def _in_call(self) -> bool:
        """A call up to its arguments; all of it if its keys are others than expected."""
        self._item += self._take(self._object.scan(self._rest))
        head = _HEAD.match(self._item)
        if head:
            self._rest = self._item[head.end() :] + self._rest
            self._item = head[0]
            try:
                name = parse(head[1])
            except ValueError as error:
                return self._break(f"it is no JSON: {error}")
            self._begin(name)
            self._object = ObjectScanner()
            return self._go(self._in_arguments)
        if not self._object.ended:
            return False
        try:
            name, arguments = _read_call(self._item)
        except ValueError as error:
            return self._break(str(error))
        self._begin(name)
        self._add_arguments(arguments)
        return self._end()

    def _in_arguments(self) -> bool:
        if not self._rest:
            return False
        arguments = self._take(self._object.scan(self._rest))
        self._item += arguments
        self._add_arguments(arguments)
        if not self._object.ended:
            return False
        try:
            strictly(self._call.text)
        except ValueError as error:
            return self._break(f"its arguments are no JSON: {error}")
        self._object = ObjectScanner(depth=1)
        self._reason = ""  # here: what follows the arguments
        return self._go(self._after_arguments)

    def _after_arguments(self) -> bool:
        """Up to the end of the call: further keys have no meaning."""
        taken = self._take(self._object.scan(self._rest))
        self._item, self._reason = self._item + taken, self._reason + taken
        if not self._object.ended:
            return False
        try:
            parse('{"": 0' + self._reason)
        except ValueError as error:
            return self._break(f"it is no JSON: {error}")
        return self._end()

    def _after_list(self) -> bool:
        """What ends a list of calls, if it is there."""
        end = self._mark.end(self._rest)
        if end is None:
            return False
        self._take(end)
        self._at_start = False
        return self._go(self._in_text)

    def _in_broken(self) -> bool:
        """What is broken ends where the list's own mark says so, else with the answer."""
        begin = self._rest.find(CLOSE) if self._mark.trained else -1
        if begin < 0:
            return False
        end = len(CLOSE) if self._opening else 0  # both marks of a list are shown, or none
        self._tell_broken(self._take(begin + end))
        self._take(len(CLOSE) - end)
        self._at_start = False
        return self._go(self._in_text)

    # ------------------------------------------------------------------------------------------- of one call

    def _begin(self, name: str) -> None:
        self._call, self._index, self._open = ToolCall(self._make_id(), name, ""), self._index + 1, True
        self._events.append(CallBegun(self._index, self._call.id, name))

    def _add_arguments(self, text: str) -> None:
        self._call = ToolCall(self._call.id, self._call.name, self._call.text + text)
        self._events.append(ArgumentsPiece(self._index, text))

    def _end(self) -> bool:
        self._events.append(CallEnded(self._index, self._call))
        self._opening, self._item, self._open = "", "", False
        return self._go(self._in_list if self._mark.listed else self._after_list)

    def _break(self, reason: str) -> bool:
        self._reason = reason
        return self._go(self._in_broken)

    def _tell_broken(self, more: str) -> None:
        text = self._opening + self._item + more
        self._events.append(CallBroken(text, self._reason, self._index if self._open else None))
        self._opening, self._item, self._open = "", "", False


# The usual beginning of a call, up to its arguments.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)


def _read_call(text: str) -> tuple[str, str]:
    """(name, JSON of the arguments) of a call with any keys. Raises ValueError, its message a sentence."""
    try:
        call = strictly(text)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    function = call.get("function") if isinstance(call.get("function"), dict) else call
    name = function.get("name")
    if not isinstance(name, str):
        raise ValueError("it has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = strictly(arguments)
        except ValueError as error:
            raise ValueError(f"its arguments are no JSON: {error}") from None
    if not isinstance(arguments, dict | NoneType):
        raise ValueError(f"its arguments are {kind_of(arguments)}, not an object")
    return name, json.dumps(arguments or {}, ensure_ascii=False)


def strictly(text: str) -> Any:
    """The value of a JSON text. Raises ValueError; for numbers that JSON has no form for (NaN) too."""
    value = parse(text)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("it has a number that JSON has no form for") from None
    return value
