"""What one answer says, while it is made: its text, and the tool calls in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..text.tool_calls import ArgumentsPiece, CallBegun, CallBroken, CallEvent, TextPiece, ToolCallParser, call_json
from .work import Work

Said = TextPiece | CallBegun | ArgumentsPiece


@dataclass
class Call:
    """A tool call; of an answer that was cut, perhaps without the end of its arguments."""

    id: str
    name: str
    arguments: str = ""

    @property
    def json(self) -> dict[str, Any]:
        return call_json(self.id, self.name, self.arguments)


class Speech:
    """One answer to a work. `text` and `calls` are what was said so far."""

    def __init__(self, work: Work):
        calls = work.tools and work.tool_choice != "none"
        self._parser = ToolCallParser([tool.name for tool in work.tools]) if calls else None
        self._texts: list[str] = []
        self.calls: list[Call] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, text: str) -> list[Said]:
        """What a further piece of the answer says."""
        if self._parser is None:
            return [*self._kept([TextPiece(text)] if text else [])]
        return [*self._kept(self._parser.add(text))]

    def end(self) -> list[Said]:
        """What is left at the end of the answer."""
        return [] if self._parser is None else [*self._kept(self._parser.finish())]

    def reason(self, reason: str) -> str:
        """Why the answer ended, in the words of chat completions."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _kept(self, events: list[CallEvent]) -> Iterator[Said]:
        for event in events:
            if isinstance(event, CallBroken) and event.index is None:  # it was no call
                event = TextPiece(event.text)
            if isinstance(event, TextPiece):
                self._texts.append(event.text)
                yield event
            elif isinstance(event, CallBegun):
                self.calls.append(Call(event.id, event.name))
                yield event
            elif isinstance(event, ArgumentsPiece):
                self.calls[event.index].arguments += event.text
                yield event
