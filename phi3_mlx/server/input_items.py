"""The `input` of /v1/responses: a text or items, as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..text.tool_calls import call_json
from ..values import shown, text
from .faults import ApiError
from .messages import content, read_message
from .protocol import honoured, honoured_values, needed, noted, objects, table_of

_NOTED = noted("type", "id", "status", "phase")
_CALL_ITEM = table_of(
    *_NOTED, honoured("call_id", text, ""), honoured("name", text, ""), honoured("arguments", text, "")
)
_RESULT_ITEM = table_of(*_NOTED, honoured("call_id", text, ""), honoured("output", content, ""))


def read_items(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages that the input is. Calls in a row, and a text behind them, are of one message of the assistant."""
    if isinstance(value, str):
        return [{"role": "user", "content": text(value, name)}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(objects(value, name)):
        within = f"{name}[{number}]."
        kind = item.get("type", "message")
        if kind == "message":
            turn = read_message({key: item[key] for key in item if key not in _ITEM_ALONE}, within)
            if turn["role"] == "assistant" and messages and messages[-1].get("tool_calls"):
                messages[-1]["content"] += turn["content"]  # or the calls would be over before their results come
            else:
                messages.append(turn)
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_call(item, within))
        elif kind == "function_call_output":
            values = honoured_values(_RESULT_ITEM, item, within)
            needed(values, "call_id", "output", within=within)
            messages.append({"role": "tool", "tool_call_id": values["call_id"], "content": values["output"]})
        else:
            where = f"{within}type"
            message = f"{where} {shown(kind)} is not supported, only message, function_call and function_call_output"
            raise ApiError(400, message, "unsupported_value", where)
    return messages


_ITEM_ALONE = {field.name for field in _NOTED}


def _call(item: Mapping[str, Any], within: str) -> dict[str, Any]:
    values = honoured_values(_CALL_ITEM, item, within)
    needed(values, "call_id", "name", "arguments", within=within)
    return call_json(values["call_id"], values["name"], values["arguments"])
