"""The Jinja environment of a chat template: that of transformers' `apply_chat_template`, with bounded work.

Source: transformers 5, `utils/chat_template_utils.py`. This module imports jinja2; import it inside the function that
needs it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from ..errors import ChatError
from .messages import escaped
from .metering import Meter, MeteredEnvironment, extent, metered, pay_for

_LONGEST_TEMPLATE = 256 * 1024  # characters of a template; the longest in use have 30,000
_LONGEST_ERROR = 500  # characters of a template's own error message
_MOST_WRITTEN = 1_000_000  # characters that a template may write, plus four times those of the messages


@dataclass(frozen=True)
class _Setting:
    """What a rendering needs besides the template's variables."""

    mark: str
    guard: str
    now: datetime


_setting: ContextVar[_Setting] = ContextVar("setting")


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    names: Mapping[str, Any],
    *,
    mark: str = "",
    guard: str = "",
    now: datetime | None = None,
) -> str:
    """The text that a template makes of the messages and its other variables, `names`.

    Its work and its output are bounded by a multiple of its input. `mark` is written before and after what the template
    marks as generated (`{% generation %}`). `guard`, a private-use character in the messages, is not escaped where the
    template writes lists as Python does, or JSON in ASCII. `now` is the time for templates that ask for it.
    Raises ChatError for a template that is not valid, fails or does too much.
    """
    template = _compile(source)
    messages = list(map(_with_reasoning, messages))
    size = extent(messages) + extent(names)
    setting = _setting.set(_Setting(mark, guard, now or datetime.now()))
    try:
        with Meter(size, len(messages)):
            text = template.render({"tools": None, "documents": None, **names, "messages": messages})
    except ChatError:
        raise
    except Exception as error:  # a template is a program and may fail in any way
        raise ChatError(f"the chat template cannot render these messages: {_one_line(error)}") from None
    finally:
        _setting.reset(setting)
    text = text.replace(escaped(guard), guard)
    if len(text) > _MOST_WRITTEN + 4 * size:
        raise ChatError(
            f"the chat template makes {len(text):,} characters of messages that have {size:,}, which no ordinary "
            "template does; use another copy of the model's files, or send raw text"
        )
    return text


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its reasoning, if it has one, under every name that templates use."""
    known = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[key] for key in known if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _LONGEST_TEMPLATE:
        raise ChatError(
            f"the chat template has {len(source):,} characters; {_LONGEST_TEMPLATE:,} are the most that is taken"
        )
    environment = MeteredEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = metered("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except RecursionError:
        raise ChatError("the chat template is not valid Jinja: it is nested too deep") from None
    except Exception as error:  # Python compiles the code that Jinja generates, and has its own limits
        raise ChatError(f"the chat template is not valid Jinja: {_one_line(error)}") from None


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, around what the model generates itself."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block, as in transformers: variables that are set inside are local."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        mark = _setting.get().mark
        return f"{mark}{caller()}{mark}"


class _Dict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # as in Jinja: `namespace(self=...)` is a name like others
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return pay_for(Namespace.__repr__(self))  # it may contain the same namespace many times


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: it begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own would write < and > as \u003c and \u003e, for web pages.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    guard = _setting.get().guard
    if ensure_ascii and guard:
        text = text.replace(json.dumps(guard)[1:-1], guard)
    return text


def _strftime_now(form: str) -> str:
    return _setting.get().now.strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{error}"[:_LONGEST_ERROR].split()) or type(error).__name__
    return text if len(text) < _LONGEST_ERROR else text[: _LONGEST_ERROR - 4] + " ..."
