"""Chat messages: a role, a text, and other keys that the model's chat template reads."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ChatError
from ..fields import shorten

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
RESULT = "tool_response"  # whom Phi-4-mini's vocabulary has a token for, where it is told what a tool gave

# Keys that change what a conversation says or what of it is learnt. Others (an "id", a date) are notes.
MEANINGFUL = frozenset(
    """tools tool_calls tool_call_id name function_call functions reasoning_content reasoning thinking documents images
    audio weight train refusal prefix""".split()
)

_FORM = '{"role": "user", "content": "text"}'
_DEEPEST = 32  # levels of lists and mappings in a message

# Unicode's private-use characters: few texts have any.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def checked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as plain dicts, without keys whose value is None. Raises ChatError for malformed ones."""
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise ChatError(f"messages are a list, and this is {shorten(messages)}: give [{_FORM}]")
    plain = [_checked(message, number) for number, message in enumerate(messages, 1)]
    if not plain:
        raise ChatError("the list of messages is empty: give at least one user message")
    return plain


def checked_tools(tools: Any) -> list[Any] | None:
    """Descriptions of tools as plain lists and dicts, None if there are none. Raises ChatError."""
    if not tools and (tools is None or isinstance(tools, (list, tuple))):
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError("tools is a list of mappings that describe them, with their names and parameters")
    return [_plain(tool, f"tools[{n}]") for n, tool in enumerate(tools)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(f"message {number} is {shorten(message)}: a message is {_FORM}")
    for key in ("role", "content"):
        if key not in message:
            raise ChatError(f"message {number} has no {key!r}: a message is {_FORM}")
        if not isinstance(message[key], str):
            raise ChatError(f"message {number} has {key!r} of type {type(message[key]).__name__}: it must be text")
    for key in message:
        if not isinstance(key, str):
            raise ChatError(f"message {number} has the key {shorten(key)}: keys must be text")
    if message["role"] not in (*ROLES, RESULT):
        raise ChatError(f"message {number} has the role {shorten(message['role'])}: roles are {', '.join(ROLES)}")
    return {key: _plain(value, f"message {number}, {key!r}") for key, value in message.items() if value is not None}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as JSON data: texts, numbers, true, false, null, and lists and mappings of them. Raises ChatError."""
    if depth > _DEEPEST:
        raise ChatError(f"{where} is nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(part, where, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, where, depth + 1) for part in value]
    if isinstance(value, str):
        return str.__str__(value)  # a subclass of str may have other methods; keep the text alone
    if value is None or type(value) in (int, float, bool):
        return value
    raise ChatError(f"{where} holds a {type(value).__name__}: it must be made of texts, numbers, lists and mappings")


def each_text(value: Any) -> Iterator[str]:
    """All texts in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from each_text(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from each_text(part)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every text in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): with_texts(part, change) for key, part in value.items()}
    return [with_texts(part, change) for part in value] if isinstance(value, (list, tuple)) else value


def escaped(character: str) -> str:
    """A private-use character as Python's `repr` of a list or mapping spells it."""
    return repr(character)[1:-1]


def unused(*values: Any) -> str:
    """A private-use character that no text of the values contains, neither itself nor as Python escapes it."""
    texts = [text for value in values for text in each_text(value)]
    used: set[str] = set().union(*texts)
    for character in map(chr, itertools.chain(*_PRIVATE_USE)):
        if character not in used and not any(escaped(character) in text for text in texts):
            return character
    raise ChatError("the messages hold every private-use character of Unicode, and one is needed; leave one out")


def without(messages: Sequence[Message], role: str, key: str) -> list[Message]:
    """The messages, without `key` in those of `role`."""
    return [{k: v for k, v in m.items() if k != key} if m["role"] == role else m for m in messages]


def with_tools(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The messages with the tools as JSON in the first system message, which is added if there is none."""
    place = next((n for n, message in enumerate(messages) if message["role"] == "system"), None)
    head = {"role": "system", "content": ""} if place is None else messages[place]
    if "tools" in head:
        raise ChatError("tools are given twice: beside the messages, and in the system message; leave one out")
    head = {**head, "tools": json.dumps(tools, ensure_ascii=False)}
    return [head, *messages] if place is None else [*messages[:place], head, *messages[place + 1 :]]


def with_tools_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with their own `tools` as JSON where they are lists."""
    as_text = lambda tools: tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)  # noqa: E731
    return [{**m, "tools": as_text(m["tools"])} if "tools" in m else m for m in messages]


def fold(messages: Sequence[Message], dropped: set[int]) -> list[Message]:
    """The messages without those of the indexes `dropped`, whose text goes to the front of the next user message."""
    folded: list[Message] = []
    texts: list[str] = []  # of dropped messages, for the next user message
    for n, message in enumerate(messages):
        if n in dropped:
            texts += [message["content"]] if message["content"] else []
        elif texts and message["role"] == "user":
            folded.append({**message, "content": "\n\n".join([*texts, message["content"]])})
            texts = []
        else:
            folded.append(message)
    if texts:
        raise ChatError("the model's chat template has no place for a system message and no user message follows it")
    return folded
