"""The grammar of an answer that may call tools: a text, calls whose arguments fit their schemas, or both."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from .call_marks import CLOSE, OPEN

MOST_CALLS = 32  # in one answer: a small model may repeat a call without end


@dataclass(frozen=True)
class CallForm:
    """What an answer may be, where there are tools.

    `tools`: (name, JSON schema of the arguments as text) of those that may be called. `trained`: whether calls stand
    between the model's own marks, else in an object with the key "tool_calls". `least`, `most`: how many calls; with 0
    the answer may be text. `text`: (kind, text) of the `Form` that a text must have; None for any text, in which case
    calls may follow a text.
    """

    tools: tuple[tuple[str, str], ...]
    trained: bool
    least: int
    most: int
    text: tuple[str, str] | None = None

    @classmethod
    def read(cls, text: str) -> CallForm:
        fields = json.loads(text)
        form = fields["text"]
        return cls(**{**fields, "tools": tuple(map(tuple, fields["tools"])), "text": form and tuple(form)})

    def __str__(self) -> str:
        """As a `Form` holds it."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @property
    def lark(self) -> str:
        """The rules, with `@arguments_0` and so on for the arguments, and `@text`."""
        free = self.text is None and not self.least
        text = ".*" if self.trained else _UNMARKED
        rules = [f"TEXT: /(?s:{text})/"] if free else []
        ways = [] if self.least else ["TEXT" if free else "@text"]
        if self.most:
            calls = f'call (", " call){{0,{self.most - 1}}}' if self.most > 1 else "call"
            if self.trained:
                ways.append(f'{"TEXT " if free else ""}{OPEN} "[" {calls} "]" {CLOSE}')
            else:
                # One lexeme for text and mark, because the lexer cannot tell where one ends and the other begins.
                rules.append(f"LEAD: /(?s:{text + _FREE_MARK if free else re.escape(_PLAIN_MARK)})/")
                ways.append(f'LEAD {calls} "]}}"')
            rules.append(self._call())
        return "\n".join([f"start: {' | '.join(ways)}", *rules])

    def _call(self) -> str:
        """The rule of a call: the tool's name decides which arguments follow."""
        heads = [json.dumps(f'{json.dumps(name)}, "arguments": ') for name, _ in self.tools]
        ways = " | ".join(f"{head} @arguments_{n}" for n, head in enumerate(heads))
        return f'call: {json.dumps(_CALL_BEGINS)} ({ways}) "}}"'


_PLAIN_MARK = '{"tool_calls": ['
_CALL_BEGINS = '{"name": '
_CALLS_KEY = '"tool_calls"'
# As a model may write it that means to call; white space without end is not for it.
_FREE_MARK = rf"\{{[ \n]{{0,4}}{_CALLS_KEY} ?: ?\["


def _other_than(text: str) -> str:
    """A pattern of what has no brace and does not begin with `text`, whose first character was not white space."""
    white = r"\s" if text == _CALLS_KEY else ""
    longer = f"|{text[0]}{_other_than(text[1:])}" if text[1:] else ""
    return rf"(?:[^{{{text[0]}{white}][^{{]*{longer})?"


# A text in which the key of calls follows no brace.
_UNMARKED = rf"[^{{]*(?:\{{\s*{_other_than(_CALLS_KEY)})*"
