"""Messages of a request, as the chat template takes them: a role and a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..values import shown, text
from .faults import ApiError
from .protocol import Table, honoured, honoured_values, needed, neutral, noted, objects, refused, table_of

_CONTENT_FIELD = honoured(
    "content", lambda value, name: content(value, name), "a text, or a list of parts that are texts"
)
_ROLE_FIELD = honoured("role", text, "")
_NAME_FIELD = honoured("name", text, "where the model's chat template reads it")
_TEXT_ALONE = table_of(_ROLE_FIELD, _CONTENT_FIELD, _NAME_FIELD)
_MESSAGES: Mapping[str, Table] = {
    "system": _TEXT_ALONE,
    "user": _TEXT_ALONE,
    "assistant": table_of(
        _ROLE_FIELD,
        _CONTENT_FIELD,
        _NAME_FIELD,
        honoured("tool_calls", objects, "calls that the model made"),
        neutral("refusal"),
        neutral("annotations"),
        *refused("audio", "function_call", "reasoning", "reasoning_content"),
    ),
    "tool": table_of(
        _ROLE_FIELD,
        _CONTENT_FIELD,
        honoured("tool_call_id", text, "which call it answers"),
        *noted("name", says="the call's id says whose result it is"),
    ),
}
_PART = table_of(*noted("type", "prompt_cache_breakpoint"), honoured("text", text, ""))
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages, each of a role that templates know; `developer` is OpenAI's newer name of `system`."""
    return [read_message(message, f"{name}[{n}].") for n, message in enumerate(objects(value, name))]


def read_message(given: Mapping[str, Any], within: str) -> dict[str, Any]:
    """One message; `within` leads to it, "messages[0]."."""
    role = given.get("role")
    role = "system" if role == "developer" else role
    table = _MESSAGES.get(role) if isinstance(role, str) else None
    if table is None:
        roles = ", ".join(["developer", *_MESSAGES])
        raise ApiError(400, f"{within}role is {shown(role)}; choose {roles}", "invalid_value", f"{within}role")
    given = {key: value for key, value in given.items() if not (key == "annotations" and value == [])}
    message = {**honoured_values(table, given, within), "role": role}
    if role == "assistant":
        message.setdefault("content", "")
    needed(message, "content", within=within)
    return message


def content(value: Any, name: str) -> str:
    """The text of a message's content; parts are put on lines of their own. ApiError for an image and the like."""
    if isinstance(value, str):
        return text(value, name)
    if not isinstance(value, list):
        raise OptionError(f"{name} is {shown(value)}; expected a text, or a list of parts")
    texts = []
    for number, part in enumerate(objects(value, name)):
        within = f"{name}[{number}]."
        if part.get("type") not in _TEXT_PARTS:
            where = f"{within}type"
            raise ApiError(
                400, f"{where} {shown(part.get('type'))} is not supported, only texts", "unsupported_value", where
            )
        values = honoured_values(
            _PART, {key: part[key] for key in part if key not in ("annotations", "logprobs")}, within
        )
        needed(values, "text", within=within)
        texts.append(values["text"])
    return "\n".join(texts)
