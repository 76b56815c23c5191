"""Whole answers with tool calls, parsed at once."""

from dataclasses import dataclass

from phi3_mlx.text.tool_calls import CallBroken, CallEnded, TextPiece, ToolCall, ToolCallParser


@dataclass(frozen=True)
class Parsed:
    """A whole answer: its text, its calls, and what could not be read."""

    text: str
    calls: tuple[ToolCall, ...]
    broken: tuple[CallBroken, ...]


def parse_calls(answer, names=()):
    """The text and the calls of an answer; `names` are those of the tools."""
    parser = ToolCallParser(names)
    events = [*parser.add(answer), *parser.finish()]
    return Parsed(
        "".join(event.text for event in events if isinstance(event, TextPiece)),
        tuple(event.call for event in events if isinstance(event, CallEnded)),
        tuple(event for event in events if isinstance(event, CallBroken)),
    )
