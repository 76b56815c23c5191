"""/v1/responses: fields, and the reply as a whole or as the events that OpenAI's clients know."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from uuid import uuid4

from ..errors import OptionError
from ..values import flag, shown, text
from . import protocol
from . import shared_fields as shared
from .asked import Asked, Defaults
from .faults import ApiError
from .input_items import read_items
from .output_items import ItemEvent, OutputItems
from .protocol import honoured, honoured_values, needed, neutral, noted, of_request, refused, table_of
from .speech import Speech
from .streams import StreamEvent
from .tokens import Usage, chat_logprobs
from .work import MAX_TOP_LOGPROBS, Begun, Ended, Event, Piece, Work

_LOGPROBS = "message.output_text.logprobs"
# What a client may ask to have included; the second is of models that think first.
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")


def _text_format(value: Any, name: str) -> str | None:
    return shared.the_schema(protocol.an_object(value, name), name)


_TEXT = table_of(
    honoured("format", _text_format, "`text`, `json_object` or `json_schema`; the answer always fits"),
    neutral("verbosity", "medium"),
)


def _text(value: Any, name: str) -> str | None:
    """The schema of `text.format`; None for text."""
    return honoured_values(_TEXT, protocol.an_object(value, name), f"{name}.").get("format")


def _include(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(item in _INCLUDED for item in value):
        raise OptionError(f"{name} is {shown(value)}; expected a list of {', '.join(_INCLUDED)}")
    return value


RESPONSE_FIELDS = table_of(
    honoured("model", text, "a name that `/v1/models` lists"),
    honoured("input", read_items, "a text, or messages, `function_call` and `function_call_output` items"),
    honoured("instructions", text, "a system message before the input"),
    honoured("stream", flag, "the answer as it is made"),
    honoured("stream_options", shared.stream_options, "accepted, as streams have no obfuscation"),
    of_request("max_output_tokens", "max_tokens"),
    *shared.SAMPLING,
    honoured("text", _text, "`format`: `text`, `json_object` or `json_schema`; the answer always fits"),
    *shared.FORMS,
    *shared.TOOLS,
    honoured("include", _include, f"`{_LOGPROBS}`: the log-probability of each token"),
    honoured("top_logprobs", shared.whole_from(0, MAX_TOP_LOGPROBS), "and the likeliest in its place"),
    honoured("metadata", protocol.an_object, "repeated in the reply"),
    neutral("background", False),
    neutral("truncation", "disabled"),
    neutral("reasoning", {}, {"effort": "none"}),
    *(field for field in shared.BOOKKEEPING if field.name != "metadata"),
    *noted("max_tool_calls", says="of OpenAI's own tools, which are not here"),
    *refused("previous_response_id", "conversation", says="nothing is stored; send all items"),
    *refused("prompt", says="nothing is stored; send its text"),
    *refused("access_programs", "background_options", "context_management", "image", "moderation"),
)


def read_response(body: Mapping[str, Any], defaults: Defaults) -> Asked:
    """What a body asks for. Raises ApiError."""
    values = protocol.honoured_values(RESPONSE_FIELDS, body)
    needed(values, "model", "input")
    messages = values["input"]
    if "instructions" in values:
        messages = [{"role": "system", "content": values["instructions"]}, *messages]
    if not messages:
        raise ApiError(400, "input is empty; give some text", "invalid_value", "input")
    schema = values.get("text")
    scored = _LOGPROBS in values.get("include", ()) or values.get("top_logprobs")
    work = Work(
        values["model"],
        messages,
        protocol.request_of(defaults, RESPONSE_FIELDS, values, **({} if schema is None else {"schema": schema})),
        top_logprobs=values.get("top_logprobs", 0) if scored else None,
        **shared.tool_fields(values),
    )
    return Asked([work], ResponseReply(work, body, values), values.get("stream", False))


class ResponseReply:
    """The answer to one request; see `streams.Reply`. Its stream is numbered events, each with a name."""

    last_line = ""

    def __init__(self, work: Work, body: Mapping[str, Any], values: Mapping[str, Any]):
        self._work, self._values = work, values
        self._format = (body.get("text") or {}).get("format") or {"type": "text"}
        self._tools, self._choice = body.get("tools") or [], body.get("tool_choice") or "auto"
        self._speech = Speech(work)
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())
        self._usage: Usage | None = None
        self._items = OutputItems()
        self._reason: str | None = None
        self._number = 0

    def take(self, number: int, event: Event) -> Iterator[StreamEvent]:
        if isinstance(event, Begun):
            usage = Usage()
            usage.begin(event)
            self._usage = usage
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, {"response": self._response("in_progress")})
        elif isinstance(event, Piece):
            logprobs = [] if self._work.top_logprobs is None else [chat_logprobs(token) for token in event.tokens]
            yield from self._named(self._items.add(self._speech.add(event.text), logprobs))
        elif isinstance(event, Ended):
            assert self._usage is not None
            self._usage.made += event.tokens
            self._reason = event.reason
            yield from self._named(self._items.add(self._speech.end(), []))
            yield from self._named(self._items.finish(complete=event.reason == "stop"))

    def end(self) -> Iterator[StreamEvent]:
        status = "incomplete" if self._reason == "length" else "completed"
        yield self._event(f"response.{status}", {"response": self.whole()})

    def failed(self, error: ApiError) -> Iterator[StreamEvent]:
        fault = {"code": error.code, "message": str(error), "param": error.param}
        yield self._event("error", fault)
        response = {**self._response("failed"), "error": {"code": "server_error", "message": str(error)}}
        yield self._event("response.failed", {"response": response})

    def whole(self) -> dict[str, Any]:
        return self._response("incomplete" if self._reason == "length" else "completed")

    def _named(self, told: Iterable[ItemEvent]) -> Iterator[StreamEvent]:
        for kind, fields in told:
            yield self._event(kind, fields)

    def _event(self, kind: str, fields: Mapping[str, Any]) -> StreamEvent:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return StreamEvent(event, kind)

    def _response(self, status: str) -> dict[str, Any]:
        request, values = self._work.request, self._values
        done = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if done else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": values.get("instructions"),
            "max_output_tokens": request.max_tokens,
            "metadata": values.get("metadata", {}),
            "model": self._work.model,
            "output": self._items.told,
            "parallel_tool_calls": self._work.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": self._format},
            "tool_choice": self._choice,
            "tools": self._tools,
            "top_logprobs": self._work.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": self._usage.response() if done and self._usage else None,
            "user": None,
        }
