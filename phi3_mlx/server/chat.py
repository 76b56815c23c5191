"""/v1/chat/completions: fields, and the reply as a whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from ..text.tool_calls import CallBegun, TextPiece
from ..values import flag, text
from . import protocol
from . import shared_fields as shared
from .asked import Asked, Defaults
from .faults import ApiError
from .limits import Limits
from .messages import read_messages
from .protocol import honoured, needed, neutral, noted, of_request, refused, table_of
from .speech import Call, Said, Speech
from .streams import DONE, StreamEvent
from .tokens import Usage, chat_logprobs
from .work import MAX_TOP_LOGPROBS, Begun, Ended, Event, Piece, Work

_RESPONSE_FORMAT = table_of(*noted("type"), honoured("json_schema", protocol.an_object, ""))


def _response_format(value: Any, name: str) -> str | None:
    """The schema of `response_format`; None for text."""
    kind = protocol.an_object(value, name)
    if kind.get("type") != "json_schema":
        return shared.the_schema(kind, name)
    values = protocol.honoured_values(_RESPONSE_FORMAT, kind, f"{name}.")
    needed(values, "json_schema", within=f"{name}.")
    return shared.the_schema({**values["json_schema"], "type": "json_schema"}, f"{name}.json_schema")


CHAT_FIELDS = table_of(
    honoured("model", text, "a name that `/v1/models` lists"),
    honoured("messages", read_messages, "roles `developer`, `system`, `user`, `assistant`, `tool`; contents are texts"),
    honoured("stream", flag, "the answer as it is made"),
    honoured("stream_options", shared.stream_options, "`include_usage`: a last chunk with the counts of tokens"),
    *shared.SAMPLING,
    of_request("max_tokens"),
    of_request("max_completion_tokens", "max_tokens", "newer name of `max_tokens`"),
    honoured("n", shared.whole_from(1, Limits.answers), "answers to the prompt, which is read once"),
    honoured("logprobs", flag, "the log-probability of each token"),
    honoured(
        "top_logprobs",
        shared.whole_from(0, MAX_TOP_LOGPROBS),
        "and the likeliest in its place; needs `logprobs`",
    ),
    honoured("response_format", _response_format, "`text`, `json_object` or `json_schema`; the answer always fits"),
    *shared.FORMS,
    *shared.TOOLS,
    neutral("features", {}, says="the server searches nothing and runs nothing"),
    neutral("modalities", ["text"]),
    neutral("reasoning_effort", "none"),
    neutral("verbosity", "medium"),
    *shared.BOOKKEEPING,
    *refused("audio", "moderation", "prediction", "web_search_options"),
    *refused("functions", "function_call", says="give `tools` and `tool_choice`"),
)


def read_chat(body: Mapping[str, Any], defaults: Defaults) -> Asked:
    """What a body asks for. Raises ApiError."""
    values = protocol.honoured_values(CHAT_FIELDS, body)
    needed(values, "model", "messages")
    if not values["messages"]:
        raise ApiError(400, "messages is empty; give at least one", "invalid_value", "messages")
    alternatives = values.get("top_logprobs")
    if alternatives is not None and not values.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    streamed = values.get("stream", False)
    schema = values.get("response_format")
    forms = {} if schema is None else {"schema": schema}
    work = Work(
        values["model"],
        values["messages"],
        protocol.request_of(defaults, CHAT_FIELDS, values, **forms),
        n=values.get("n", 1),
        top_logprobs=(alternatives or 0) if values.get("logprobs") else None,
        **shared.tool_fields(values),
    )
    reply = ChatReply(work, defaults.fingerprint(work.model), usage=shared.wants_usage(values))
    return Asked([work], reply, streamed)


class ChatReply:
    """The answers to one chat; see `streams.Reply`."""

    last_line = DONE

    def __init__(self, work: Work, fingerprint: str, *, usage: bool):
        self._work, self._fingerprint, self._told_usage = work, fingerprint, usage
        self._usage = Usage()
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self._speech = [Speech(work) for _ in range(work.n)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(work.n)]
        self._reasons: list[str | None] = [None] * work.n

    def take(self, number: int, event: Event) -> Iterator[StreamEvent]:
        if isinstance(event, Begun):
            self._usage.begin(event)
            for index in range(self._work.n):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        elif isinstance(event, Piece):
            yield from self._said(event.index, self._speech[event.index].add(event.text), self._scored(event))
        elif isinstance(event, Ended):
            speech = self._speech[event.index]
            yield from self._said(event.index, speech.end())
            self._usage.made += event.tokens
            self._reasons[event.index] = speech.reason(event.reason)
            yield self._chunk(event.index, {}, reason=self._reasons[event.index])

    def end(self) -> Iterator[StreamEvent]:
        if self._told_usage:
            yield StreamEvent({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage.completion()})

    def failed(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error.body())

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(self._work.n)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage.completion()}

    def _said(self, index: int, said: list[Said], logprobs: Mapping[str, Any] | None = None) -> Iterator[StreamEvent]:
        """A chunk for each thing that was said; the first has the log-probabilities of the tokens."""
        deltas = [_delta(event) for event in said] or ([{"content": ""}] if logprobs else [])
        for delta in deltas:
            yield self._chunk(index, delta, logprobs)
            logprobs = None

    def _scored(self, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities of a piece's tokens, if they are asked for; kept for the whole too."""
        if self._work.top_logprobs is None or not piece.tokens:
            return None
        tokens = [chat_logprobs(token) for token in piece.tokens]
        self._logprobs[piece.index] += tokens
        return {"content": tokens, "refusal": None}

    def _choice(self, index: int) -> dict[str, Any]:
        speech = self._speech[index]
        content = speech.text or (None if speech.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if speech.calls:
            message["tool_calls"] = [call.json for call in speech.calls]
        scored = self._work.top_logprobs is not None
        logprobs = {"content": self._logprobs[index], "refusal": None} if scored else None
        reason = self._reasons[index]
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> StreamEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return StreamEvent({**chunk, "usage": None} if self._told_usage else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._work.model,
            "system_fingerprint": self._fingerprint,
        }


def _delta(event: Said) -> dict[str, Any]:
    """What a chunk tells of text, of the beginning of a call, or of more of its arguments."""
    if isinstance(event, TextPiece):
        return {"content": event.text}
    if isinstance(event, CallBegun):
        return {"tool_calls": [{"index": event.index, **Call(event.id, event.name).json}]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
