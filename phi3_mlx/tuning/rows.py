"""What a line of training data may be, and what is wrong with one that is something else.

A line is a JSON object of one of these forms:

    {"messages": [{"role", "content"}, ...]}
    {"conversations": [{"from", "value"}, ...]}     the same, as ShareGPT has it
    {"prompt", "completion"}                        texts, or both lists of messages
    {"text"}

All but the last may have a "system" message and "tools" beside them. An assistant message with "weight" 0 or "train"
false is read and not learnt. What else a message has goes to the chat template, as in a prompt. Keys whose value is
null count as absent. Other keys beside these are not used, and said to be so; those that would change what is learnt
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..fields import kind_of, shorten
from ..text.messages import ROLES

_FORMS = ("messages", "conversations", "prompt", "completion", "text")
_SHOWN_KEYS = 8  # keys
_EXPECTED = 'expected "messages", or "prompt" and "completion", or "text"'
# Beside messages these would change what is said or learnt.
_NOT_HONOURED = (
    "functions", "function_call", "documents", "images", "image", "audio", "audios", "videos", "weight", "train",
    "chat_template_kwargs",
)  # fmt: skip
# Other names of what "train" says of a message.
_NOT_TRAIN = ("training", "train_detail", "loss", "loss_weight", "mask")
# ShareGPT's names for who speaks.
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool", **{role: role for role in ROLES},
}  # fmt: skip
# What others call a prompt, and its completion.
_PROMPTS, _COMPLETIONS = ("instruction", "question", "query", "input"), ("output", "response", "answer", "chosen")
# What lines for an objective other than the usual one have.
_OF_OBJECTIVES = {("chosen", "rejected"): "dpo", ("completion", "label"): "kto"}


@dataclass(frozen=True)
class Record:
    """One line: a conversation, or (messages None) a text. `source` is "file:line".

    `tools` are those beside the messages. `unlearnt` are numbers of assistant turns, from 1, that are read alone.
    """

    source: str
    messages: tuple[dict[str, Any], ...] | None
    text: str | None
    tools: tuple[Mapping[str, Any], ...] = ()
    unlearnt: frozenset[int] = frozenset()


def read_row(value: Any, source: str, unused: dict[str, str]) -> Record:
    """The example that a line's value is. Keys that have no use are added to `unused`, with the source.

    Raises DataError that names the key and says what was expected, without the source.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {kind_of(value)}; expected a JSON object")
    row = {key: part for key, part in value.items() if part is not None}
    forms = [key for key in _FORMS if key in row]
    if not forms:
        forms = [key for key in _FORMS if key in value][:1]
        raise DataError(f"{forms[0]!r} is null; {_EXPECTED}" if forms else _no_form(value))
    record = _of_text(row, source) if forms == ["text"] else _of_conversation(row, forms, source)
    for key in row:
        if key not in (*_FORMS, "system", "tools"):
            if key in _NOT_HONOURED and row[key] not in ("", [], {}):
                raise DataError(f"{key!r} beside {forms[0]!r} is not honoured; leave it out, or say it in the messages")
            unused.setdefault(key, source)
    return record


def for_another_objective(row: Mapping[str, Any]) -> str:
    """What a line that does not fit is for, as the end of a sentence; else ""."""
    for keys, objective in _OF_OBJECTIVES.items():
        if row.keys() >= set(keys):
            return f"; {' and '.join(map(repr, keys))} are for objective={objective!r}"
    return ""


def _no_form(value: dict[str, Any]) -> str:
    if not value:
        return f"is an empty object; {_EXPECTED}"
    more = f" and {len(value) - _SHOWN_KEYS:,} more" if len(value) > _SHOWN_KEYS else ""
    fault = f"has only the keys {', '.join(map(shorten, [*value][:_SHOWN_KEYS]))}{more}; {_EXPECTED}"
    if elsewhere := for_another_objective(value):
        return fault + elsewhere
    prompt = next((key for key in _PROMPTS if key in value), None)
    completion = next((key for key in _COMPLETIONS if key in value), None)
    if prompt and completion:
        fault += f": rename {prompt!r} to 'prompt' and {completion!r} to 'completion'"
    return fault


def _of_text(row: dict[str, Any], source: str) -> Record:
    _check_text(row["text"], "'text'")
    for key in ("system", "tools"):
        if row.get(key):
            raise DataError(f"has {key!r} beside 'text', which is learnt as it stands; write it into the text")
    return Record(source, None, row["text"])


def _of_conversation(row: dict[str, Any], forms: list[str], source: str) -> Record:
    name = forms[0]
    if name in ("messages", "conversations"):
        for other in forms[1:]:
            if other != "prompt":
                raise _several(name, other)
        messages = _messages(row[name], name)
        said = [message["content"].strip() for message in messages if message["role"] == "user"]
        if "prompt" in forms and (not isinstance(row["prompt"], str) or row["prompt"].strip() not in said):
            raise DataError(f"has both {name!r} and a 'prompt' that no user says there; leave one of them out")
    elif "text" in forms:
        raise _several(name, "text")
    else:
        messages = _prompt_and_completion(row)
    if row.get("system"):
        _check_text(row["system"], "'system'")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": row["system"]}, *messages]
        elif messages[0]["content"] != row["system"]:
            raise DataError("has both 'system' and a system message that says something else; leave one of them out")
    learnt = [message.pop("train") for message in messages if message["role"] == "assistant"]
    name = "completion" if "completion" in forms else name
    if not learnt:
        raise DataError(f"{name!r} has no assistant turn; expected at least one, it is what is learnt")
    if not any(learnt):
        raise DataError(f'{name!r} has no assistant turn to learn; expected one without "weight": 0')
    unlearnt = frozenset(n for n, trained in enumerate(learnt, 1) if not trained)
    return Record(source, tuple(messages), None, _tools(row.get("tools")), unlearnt)


def _prompt_and_completion(row: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("prompt", "completion"):
        if key not in row:
            if elsewhere := for_another_objective(row):
                raise DataError(f"{key!r} is missing; {_EXPECTED}{elsewhere}")
            other = next((name for name in _COMPLETIONS if name in row), None) if key == "completion" else None
            raise DataError(f"{key!r} is missing; {_EXPECTED}" + (f": rename {other!r} to {key!r}" if other else ""))
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        context = [m | {"train": False} if "train" in m else m for m in _messages(row["prompt"], "prompt")]
        return [*context, *_messages(row["completion"], "completion")]
    _check_text(row["prompt"], "'prompt'")
    _check_text(row["completion"], "'completion'")
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"], "train": True},
    ]


def _several(form: str, other: str) -> DataError:
    return DataError(f"has both {form!r} and {other!r}; expected one form, to know which of them to train on")


def _messages(given: Any, name: str) -> list[dict[str, Any]]:
    """Messages as they go to the chat template; "train" of an assistant's says whether it is learnt."""
    if not isinstance(given, list) or not given:
        raise DataError(f'{name!r} is {kind_of(given)}; expected a list of {{"role", "content"}} objects')
    messages = [_message(message, f"{name}[{n}]") for n, message in enumerate(given)]
    # An empty system message is a habit of many files and says nothing.
    return [m for m in messages if m["role"] != "system" or m["content"] or "tools" in m]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise DataError(f'{where} is {kind_of(given)}; expected {{"role": ..., "content": ...}}')
    message = {key: part for key, part in given.items() if part is not None}
    if "role" not in message and "from" in message and "value" in message:
        speaker = message.pop("from")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(f"{where} 'from' is {shorten(speaker)}; expected human, gpt, system or tool")
        message = {"role": role, "content": message.pop("value"), **message}
    if message.get("role") not in ROLES:
        said = f"is {shorten(message['role'])}" if "role" in message else "is null" if "role" in given else "is missing"
        raise DataError(f"{where} 'role' {said}; expected {', '.join(ROLES)}")
    calls = bool(message.get("tool_calls"))
    if "content" not in message and (calls or (message["role"] == "system" and "content" in given)):
        message["content"] = ""
    if "content" not in message:
        raise DataError(f"{where} 'content' {'is null' if 'content' in given else 'is missing'}; expected a text")
    if message["content"] != "" or not (calls or message["role"] == "system"):
        _check_text(message["content"], f"{where} 'content'")
    learnt = _is_learnt(message, where)
    message = {key: part for key, part in message.items() if key not in ("weight", "train")}
    return message | {"train": learnt} if message["role"] == "assistant" else message


def _is_learnt(message: dict[str, Any], where: str) -> bool:
    """Whether a message is to be learnt, as its "weight" or "train" says; an assistant's is if it says nothing."""
    for key in _NOT_TRAIN:
        if key in message:
            raise DataError(f'{where} {key!r} is not honoured; say which turns are learnt by "train": true or false')
    said = set()
    for key, choice in (("weight", "0 or 1"), ("train", "true or false")):
        if key in message:
            if not isinstance(message[key], (bool, int, float)) or message[key] not in (0, 1):
                raise DataError(f"{where} {key!r} is {shorten(message[key])}; expected {choice}")
            said.add(bool(message[key]))
    if len(said) > 1:
        raise DataError(f"{where} has 'weight' and 'train', which contradict each other; leave one of them out")
    if message["role"] != "assistant" and True in said:
        raise DataError(
            f"{where} is to be learnt and has the role {message['role']!r}; only assistant turns are learnt"
        )
    return False not in said


def _tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools beside the messages: a list of objects, or that as JSON text."""
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError):
            tools = given
    if not tools and (tools is None or isinstance(tools, list)):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"'tools' is {kind_of(given)}; expected a list of objects, each describing a tool")
    return tuple(tools)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}; expected a text")
    if not value.strip():
        raise DataError(f"{where} is empty; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a character (a lone surrogate at {error.start + 1}); expected a text"
        ) from None
