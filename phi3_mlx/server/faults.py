"""What went wrong, as OpenAI's clients read it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from http import HTTPStatus
from typing import Any

from ..errors import (
    ChatError,
    ClosedError,
    ContextLengthError,
    MemoryLimitError,
    ModelNotFoundError,
    OptionError,
    Phi3Error,
    PromptError,
    QueueFullError,
)
from ..generation.request import Request

CLOSING = {"connection": "close"}  # a header: what else the client sends is not read
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Errors of the library -> status, code and the field to blame; a kind stands before the wider one that it belongs to.
_FAULTS: Mapping[type[Phi3Error], tuple[int, str, str | None]] = {
    ModelNotFoundError: (404, "model_not_found", "model"),
    ContextLengthError: (400, "context_length_exceeded", "messages"),
    PromptError: (400, "invalid_prompt", "messages"),
    ChatError: (400, "invalid_messages", "messages"),
    MemoryLimitError: (400, "memory_limit_exceeded", None),
    OptionError: (400, "invalid_value", None),
    ClosedError: (503, "server_closing", None),
    Phi3Error: (500, "server_error", None),
}


_REQUEST_FIELDS = {field.name for field in fields(Request)}


class ApiError(Phi3Error):
    """A request that is answered with an error. `param` names the field that is to blame, `code` the kind of fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """An error as the client is told it. What nobody foresaw is told without its message, which may quote a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), "rate_limit_exceeded", headers=headers)
    for kind, (status, code, param) in _FAULTS.items():
        if isinstance(error, kind):
            return ApiError(status, str(error), code, field_named(str(error)) if kind is OptionError else param)
    return ApiError(500, "the server met a fault of its own; its log has the place", "server_error")


def field_named(message: str) -> str | None:
    """The field that the message of an OptionError begins with, as chats call it."""
    name = message.split(" ", 1)[0]
    return "response_format" if name == "schema" else name if name in _REQUEST_FIELDS else None


def raw_response(error: ApiError) -> bytes:
    """A whole HTTP response that closes its connection, for where no request was understood."""
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    lines = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines |= {name.lower(): value for name, value in error.headers.items()}
    return (head + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n").encode() + body
