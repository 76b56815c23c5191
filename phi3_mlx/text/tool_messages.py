"""Calls and their results in a list of messages: checked, matched by their ids, and as plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ChatError
from ..fields import parse, shorten
from .messages import Message, checked
from .tool_calls import strictly

_CALL_FORM = '{"id": ..., "function": {"name": ..., "arguments": "{...}"}}'


def called(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, with `tool_calls` as texts `{"name": ..., "arguments": {...}}`, and results in their order.

    A result (role "tool") answers a call of the last assistant's message, the one that its `tool_call_id` names or else
    the next; it gets that call's name. Raises ChatError for malformed calls, and for a result of no call.
    """
    told = checked([_with_content(message) for message in messages])
    waiting: dict[str, tuple[int, str]] = {}  # the calls without a result: id -> place among the calls, name
    results: list[tuple[int, dict[str, Any]]] = []
    ordered: list[dict[str, Any]] = []
    for number, message in enumerate(told, 1):
        if message["role"] == "tool":
            results.append(_result(message, waiting, number))
            continue
        ordered += [result for _, result in sorted(results, key=lambda result: result[0])]
        results = []
        if message["role"] == "assistant":
            calls = [_call(call, number) for call in _listed(message.pop("tool_calls", []), number)]
            waiting = {id or f"{n}": (n, name) for n, (id, name, _) in enumerate(calls)}
            if len(waiting) < len(calls):
                raise ChatError(f"message {number} has two tool calls of the same id: give each its own")
            if calls:
                message["tool_calls"] = [text for _, _, text in calls]
        ordered.append(message)
    return ordered + [result for _, result in sorted(results, key=lambda result: result[0])]


def as_plain_text(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of `called` with calls and results as JSON texts, results in a user's message."""
    plain: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for message in [*messages, {"role": "end", "content": ""}]:
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            results.append({"name": message["name"], "result": _value(message["content"])})
            continue
        if results:
            text = json.dumps({"tool_results": results}, ensure_ascii=False)
            plain.append({"role": "user", "content": text})
            results = []
            if message["role"] == "user":  # templates may answer each user's message
                plain[-1]["content"] += f"\n\n{message['content']}"
                continue
        if calls:
            text = f'{message["content"]}{{"tool_calls": [{", ".join(calls)}]}}'
            message = {"role": "assistant", "content": text}
        plain.append({**message})
    return plain[:-1] if plain[-1]["role"] == "end" else plain


def _with_content(message: Any) -> Any:
    """An assistant's message that has calls may have no content."""
    if isinstance(message, Mapping) and message.get("tool_calls") and message.get("content") is None:
        return {**message, "content": ""}
    return message


def _listed(calls: Any, number: int) -> list[Any]:
    if not isinstance(calls, list):
        raise ChatError(f"message {number} has tool_calls {shorten(calls)}: they are a list of {_CALL_FORM}")
    return calls


def _call(call: Any, number: int) -> tuple[str, str, str]:
    """(id, name, text) of a call; the id is "" if it has none."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(call.get("id", ""), str):
        raise ChatError(f"message {number} has the tool call {shorten(call)}: a call is {_CALL_FORM}")
    arguments = function.get("arguments", {})
    try:
        value = strictly(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise ChatError(f"message {number}: the arguments of {shorten(name)} are no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ChatError(f"message {number}: the arguments of {shorten(name)} are {shorten(value)}, not an object")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {text}}}'
    # Marks that the assistant writes are tokens; in arguments, which may repeat what anybody said, they are text.
    return call.get("id", ""), name, text.replace("<|", r"\u003c|")


def _result(message: Mapping[str, Any], waiting: dict[str, tuple[int, str]], number: int) -> tuple[int, dict[str, Any]]:
    """The place of the call that a result answers, and the result with the call's name."""
    id = message.get("tool_call_id", next(iter(waiting), ""))
    if id not in waiting:
        known = f"calls without a result are {', '.join(waiting)}" if waiting else "no call before it lacks a result"
        raise ChatError(f"message {number} is the result of the call {shorten(id)}, which was not made: {known}")
    place, name = waiting.pop(id)
    if message.get("name", name) != name:
        raise ChatError(f"message {number} is a result of {shorten(message['name'])}, and call {id} is of {name}")
    return place, {"role": "tool", "content": message["content"], "name": name}


def _value(content: str) -> Any:
    """A result as JSON if it is some, else the text."""
    try:
        return parse(content)
    except ValueError:
        return content
