"""Fields that several addresses have, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import OptionError
from ..text.schemas import schema_text
from ..text.tools import Tool, ToolChoice, read_choice, read_tools
from ..values import choice, flag, number, shown, whole
from .faults import ApiError
from .protocol import (
    an_object,
    honoured,
    honoured_values,
    needed,
    neutral,
    noted,
    objects,
    of_request,
    table_of,
)

_MOST_CHOICES = 128  # each is scored, and other answers wait for all of them
_MOST_STOPS = 64  # each is looked for in each answer; OpenAI takes 4
_MOST_TEXT_CHARACTERS = 10_000  # of all choices, and of all stops
_MOST_BIASES = 20_000  # token ids; to read as many takes Python a fifth of a second, and it has one lock for all


def whole_from(least: int, most: int) -> Callable[[Any, str], int]:
    """A whole number within bounds."""

    def read(value: Any, name: str) -> int:
        count = whole(value, name)
        if not least <= count <= most:
            raise OptionError(f"{name} {count} is outside its range; give {least} to {most}")
        return count

    return read


def logit_bias(value: Any, name: str) -> dict[int, float]:
    """{"token id": bias}, the bias from -100 to 100."""
    biases, given = {}, an_object(value, name)
    if len(given) > _MOST_BIASES:
        raise OptionError(f"{name} has {len(given):,} token ids; give {_MOST_BIASES:,} at most")
    for token, bias in given.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9 or str(int(token)) != token:
            raise OptionError(f"{name} has the key {shown(token)}; expected token ids")
        biases[int(token)] = number(bias, f"{name}.{token}")
        if not -100 <= biases[int(token)] <= 100:
            raise OptionError(f"{name}.{token} {shown(bias)} is outside its range; give -100 to 100")
    return biases


_TYPE_ALONE = table_of(*noted("type"))
_JSON_SCHEMA = table_of(*noted("type", "name", "description", "strict"), honoured("schema", an_object, ""))


def the_schema(kind: Mapping[str, Any], where: str) -> str | None:
    """The JSON schema that the format of an answer holds it to; None for text."""
    form = kind.get("type")
    if form not in ("text", "json_object", "json_schema"):
        message = f"{where}.type is {shown(form)}; give text, json_object or json_schema"
        raise ApiError(400, message, "invalid_value", f"{where}.type")
    values = honoured_values(_JSON_SCHEMA if form == "json_schema" else _TYPE_ALONE, kind, f"{where}.")
    if form != "json_schema":
        return None if form == "text" else '{"type": "object"}'
    needed(values, "schema", within=f"{where}.")
    return schema_text(values["schema"], f"{where}.schema")


STREAM_OPTIONS = table_of(
    honoured("include_usage", flag, "a last chunk with the counts of tokens"),
    neutral("include_obfuscation", False, True),
)


def longrope(value: Any, name: str) -> str:
    return choice(value, name, ("auto", "short", "long"))


def some_texts(field: str, most: int, *, otherwise: str = "") -> Callable[[Any, str], Any]:
    """Some texts, `most` of them, for a field of `Request`; `otherwise`: what else may be given in place of more."""
    known = of_request(field)

    def read(value: Any, name: str) -> Any:
        if isinstance(value, list) and len(value) > most:
            raise OptionError(f"{name} has {len(value):,} texts; give {most} at most{otherwise}")
        assert known.read is not None
        given = known.read(value, name)
        characters = sum(map(len, given or ()))
        if characters > _MOST_TEXT_CHARACTERS:
            raise OptionError(f"{name} has {characters:,} characters; give {_MOST_TEXT_CHARACTERS:,} at most")
        return given

    return read


def stream_options(value: Any, name: str) -> Mapping[str, Any]:
    return honoured_values(STREAM_OPTIONS, an_object(value, name), f"{name}.")


def tools(value: Any, name: str) -> tuple[Tool, ...]:
    """Functions that the model may call; OpenAI's own tools are refused by name."""
    given = [{key: part for key, part in tool.items() if part is not None} for tool in objects(value, name)]
    return tuple(read_tools(given, name))


def tool_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a work is told of tools. ApiError for a choice of a tool that was not given."""
    given = values.get("tools", ())
    try:
        chosen: ToolChoice = read_choice(values.get("tool_choice", "auto"), given)
    except OptionError as error:
        raise ApiError(400, str(error), "invalid_value", "tool_choice") from None
    return {"tools": given, "tool_choice": chosen, "parallel_tool_calls": values.get("parallel_tool_calls", True)}


def wants_usage(values: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the counts of tokens. ApiError where there is no stream to end."""
    options = values.get("stream_options")
    if options is not None and not values.get("stream"):
        raise ApiError(400, "stream_options needs stream: true", "invalid_value", "stream_options")
    return bool((options or {}).get("include_usage"))


SAMPLING = (
    of_request("temperature"),
    of_request("top_p"),
    of_request("top_k"),
    of_request("min_p"),
    of_request("repetition_penalty"),
    of_request("presence_penalty"),
    of_request("frequency_penalty"),
    honoured("logit_bias", logit_bias, "numbers that the logits of some token ids gain", "logit_bias"),
    of_request("seed"),
    honoured(
        "stop",
        some_texts("stop", _MOST_STOPS),
        "texts and control tokens that end the answer, and are not part of it",
        "stop",
    ),
)
TOOLS = (
    honoured("tools", tools, "functions that the model may call; their arguments always fit their schemas"),
    honoured("tool_choice", lambda value, _: value, "`auto`, `none`, `required`, or one function"),
    honoured("parallel_tool_calls", flag, "whether an answer may have several calls"),
)
FORMS = (
    of_request("regex"),
    of_request("grammar"),
    honoured(
        "choices",
        some_texts("choices", _MOST_CHOICES, otherwise=", or a schema with an enum"),
        "Answer with one of these texts.",
        "choices",
    ),
    honoured("longrope", longrope, "`auto`, `short` or `long`, as the server's `--longrope`"),
)
BOOKKEEPING = (
    neutral("service_tier", "auto", "default"),
    neutral("store", False, says="nothing is stored"),
    *noted(
        "chat_id",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "session_id",
        "user",
        says="says nothing of the answer",
    ),
)
