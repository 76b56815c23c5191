"""Training data on disk: `.jsonl` files, every line checked before anything else happens.

A line is a JSON object of one of three forms: {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"} with
an optional "system", or {"text"}. Other keys beside them are let be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import ROLES
from ..errors import DataError
from ..files import as_utf8, not_unicode, read_bytes

Message = dict[str, str]
_LISTED = 20  # faults shown; a file of the wrong form has one a line
_FORMS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
_EXPECTED = 'expected "messages", or "prompt" and "completion", or "text"'


@dataclass(frozen=True)
class Record:
    """One line: a conversation, or (messages None) a text. `source` is "file:line"."""

    source: str
    messages: tuple[Message, ...] | None
    text: str | None


@dataclass(frozen=True)
class Splits:
    """What to train on, what to validate on, and sentences about what was done to the data."""

    train: list[Record]
    valid: list[Record]
    notes: tuple[str, ...] = ()


def read_data(data: str | Path, valid: str | Path | None = None) -> Splits:
    """Records of a `.jsonl` file, or of a directory with train.jsonl and perhaps valid.jsonl.

    `valid` names a file to validate on instead of the directory's. Raises DataError, one line that names the file, the
    line, the key and what was expected, of up to 20 faulty lines.
    """
    path = Path(data).expanduser()
    valid_path = None if valid is None else Path(valid).expanduser()
    if path.is_dir():
        if not (path / "train.jsonl").is_file():
            raise DataError(f"{path} has no train.jsonl; put one line of JSON an example there, or name a .jsonl file")
        if valid_path is None and (path / "valid.jsonl").is_file():
            valid_path = path / "valid.jsonl"
        path = path / "train.jsonl"
    faults: list[str] = []
    train = _read(path, faults)
    held = [] if valid_path is None else _read(valid_path, faults)
    if faults:
        more = f"; and {len(faults) - _LISTED:,} more" if len(faults) > _LISTED else ""
        raise DataError("; ".join(faults[:_LISTED]) + more)
    for file, records in ((path, train), (valid_path, held)):
        if file is not None and not records:
            raise DataError(f"{file} holds no examples; write one JSON object a line")
    return Splits(train, held)


def _read(path: Path, faults: list[str]) -> list[Record]:
    try:
        data = read_bytes(path, most=None)
        lines = as_utf8(data).split(b"\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} {not_unicode(error, data, path)}") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; name a .jsonl file or a directory with one"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        source = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            faults.append(f"{source}: {not_unicode(error, data, path)}")
        except (ValueError, RecursionError) as error:
            faults.append(f"{source}: is not JSON ({error}); expected one JSON object a line")
        else:
            fault = _fault(value)
            if fault is None:
                records.append(_record(source, value))
            else:
                faults.append(f"{source}: {fault}")
    return records


def _fault(value: Any) -> str | None:
    """What is wrong with a line's value, naming the key and what was expected; None if it is an example."""
    if not isinstance(value, dict):
        return f"is {_kind(value)}; expected a JSON object"
    found = [name for name, keys in _FORMS.items() if any(key in value for key in keys)]
    if not found:
        given = f"has only the keys {', '.join(map(repr, value))}" if value else "is an empty object"
        return f"{given}; {_EXPECTED}"
    if len(found) > 1:
        return f"has both {found[0]!r} and {found[1]!r}; expected one form, to know which of them to train on"
    for key in _FORMS[found[0]]:
        if key not in value:
            return f"{key!r} is missing; {_EXPECTED}"
    if found[0] == "messages":
        return _fault_in_messages(value["messages"])
    for key in (*_FORMS[found[0]], *(["system"] if "system" in value else [])):
        if (fault := _fault_in_text(value[key])) is not None:
            return f"{key!r} {fault}"
    return None


def _fault_in_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f'\'messages\' is {_kind(messages)}; expected a list of {{"role", "content"}} objects'
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            return f'{where} is {_kind(message)}; expected {{"role": ..., "content": ...}}'
        if message.get("role") not in ROLES:
            given = f"is {message['role']!r}" if "role" in message else "is missing"
            return f"{where} 'role' {given}; expected {', '.join(ROLES)}"
        if "content" not in message:
            return f"{where} 'content' is missing; expected a text"
        # An empty system message is a habit of many files and says nothing.
        if message["role"] == "system" and message["content"] == "":
            continue
        if (fault := _fault_in_text(message["content"])) is not None:
            return f"{where} 'content' {fault}"
    if all(message["role"] != "assistant" for message in messages):
        return "'messages' has no assistant turn; expected at least one, it is what is learnt"
    return None


def _fault_in_text(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {_kind(value)}; expected a text"
    if not value.strip():
        return "is empty; expected a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half a character (a lone surrogate at {error.start + 1}); expected a text"
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]


def _record(source: str, value: dict[str, Any]) -> Record:
    if "text" in value:
        return Record(source, None, value["text"])
    if "messages" in value:
        messages: Iterable[dict[str, Any]] = value["messages"]
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        return Record(source, tuple(m for m in turns if m["role"] != "system" or m["content"]), None)
    system = [{"role": "system", "content": value["system"]}] if "system" in value else []
    talk = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]}]
    return Record(source, (*system, *talk), None)


def hold_out(records: Sequence[Record], share: float, seed: int) -> Splits:
    """Keep a share of the examples (drawn with `seed`) for validation, and at least one to train on.

    Of ten or more at least one is kept; of fewer the share is rounded down, so that the usual one keeps none.
    """
    import random

    total = len(records)
    count = max(1, round(total * share)) if share and total >= 10 else int(total * share)
    count = min(count, max(0, total - 1))
    chosen = set(random.Random(seed).sample(range(total), count))
    train = [record for n, record in enumerate(records) if n not in chosen]
    if count:
        note = f"no valid.jsonl: {count:,} of {total:,} examples were held out to validate on"
    else:
        note = f"no valid.jsonl, and {total:,} examples are too few to hold out {share:.0%}: nothing is validated"
    return Splits(train, [records[n] for n in sorted(chosen)], (note,) if share else ())
