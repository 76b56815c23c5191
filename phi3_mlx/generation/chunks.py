"""What an answer is to a caller: its chunks while it is made, its text in the end, and the calls of tools in both."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace

from ..engine.tokens import FinishReason
from ..text.tool_calls import CallBroken, CallEnded, CallEvent, TextPiece, ToolCall, ToolCallParser


@dataclass(frozen=True)
class Chunk:
    """One generated token and the text it made certain ("" while a character or a stop string is incomplete).

    `finish_reason` is None until the last chunk: "stop" (the model ended its answer or a stop string came) or
    "length". The other figures are those of the run so far: tokens (`prefilled_tokens` are those of the prompt that no
    cache held, `accepted_tokens` are those drafted that were right), tokens a second, peak bytes. `calls` are those of
    tools that the token completed; they are no part of the text.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    prompt_tokens: int
    prefilled_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    calls: tuple[ToolCall, ...] = ()


class AnswerText(str):
    """The text of an answer, which may call tools.

    `calls`: those that are complete, in their order; they are no part of the text. `finish_reason`: "stop" (the model
    ended its answer or a stop string came) or "length" (`max_tokens` or the context cut it).
    """

    calls: tuple[ToolCall, ...]
    finish_reason: FinishReason | None

    def __new__(
        cls, text: str = "", calls: Iterable[ToolCall] = (), finish_reason: FinishReason | None = None
    ) -> AnswerText:
        answer = super().__new__(cls, text)
        answer.calls, answer.finish_reason = tuple(calls), finish_reason
        return answer


def with_calls(text: str, reason: FinishReason | None, parser: ToolCallParser | None) -> AnswerText:
    """A whole answer, its calls apart from its text where there is a parser."""
    if parser is None:
        return AnswerText(text, (), reason)
    return AnswerText(*_shown_and_called([*parser.add(text), *parser.finish()]), reason)


def told_apart(chunks: Generator[Chunk, None, None], parser: ToolCallParser) -> Generator[Chunk, None, None]:
    """The chunks of an answer with its text alone, and each call in the chunk that completes it."""
    with closing(chunks):
        for chunk in chunks:
            events = parser.add(chunk.text) + (parser.finish() if chunk.finish_reason else [])
            text, calls = _shown_and_called(events)
            yield replace(chunk, text=text, calls=calls)


def _shown_and_called(events: Iterable[CallEvent]) -> tuple[str, tuple[ToolCall, ...]]:
    """The text, with what should be a call and cannot be read, and the calls."""
    shown, calls = "", []
    for event in events:
        if isinstance(event, TextPiece | CallBroken):
            shown += event.text
        elif isinstance(event, CallEnded):
            calls.append(event.call)
    return shown, tuple(calls)
