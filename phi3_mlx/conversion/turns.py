"""How a model's chat template writes turns, and the same as a template for ollama, in the syntax of Go's text/template.

A Jinja template is a program, so it is not translated. It is tried: of the forms that the family has, the one that
renders the trial conversations as the model's own template does. ollama gives a template the messages, consecutive ones
of a role joined, and lets a last message of the assistant be continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ChatError
from ..text.chat import chat_text
from ..text.messages import Message
from ..text.tokenizer import Tokenizer

_TOOLS_SYSTEM = "You are a helpful assistant with some tools."


@dataclass(frozen=True)
class Turns:
    """A turn is `before`, the role, `behind`, the content, `end`.

    `system`: a turn as others ("turn"), the same unless it is empty ("unless empty"), or the beginning of the next
    user's turn ("folded"), after which the head of the answer always stands. `tools`: Phi-4-mini's places for tools.
    """

    before: str
    behind: str
    end: str
    system: Literal["turn", "unless empty", "folded"] = "turn"
    tools: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the answer to these messages of system, user and assistant."""
        text, held, head = "", "", self._head("assistant")
        for message in messages:
            role, content = message["role"], message["content"]
            if self.system == "folded":
                if role == "system":
                    held += f"{content}\n\n" if content else ""
                elif role == "user":
                    text, held = f"{text}{self._head(role)}{held}{content}{self.end}{head}", ""
                else:
                    text += f"{content}{self.end}"
            elif role != "system" or content or self.system == "turn":
                text += f"{self._head(role)}{content}{self.end}"
        return text if self.system == "folded" else text + head

    def _head(self, role: str) -> str:
        return f"{self.before}{role}{self.behind}"

    def go_template(self) -> str:
        """The template for ollama."""
        template = _FOLDED if self.system == "folded" else _WITH_TOOLS if self.tools else _EACH_TURN
        for name, value in self._texts().items():
            template = template.replace(name, value)
        return template

    def _texts(self) -> dict[str, str]:
        shown = _UNLESS_EMPTY if self.system == "unless empty" else _ALL
        tools = {"TOLD": _TOOLS_SYSTEM, "LIST": _GO_LIST, "CALL": _GO_CALL}
        return {**tools, "SHOWN": shown, "BEFORE": self.before, "BEHIND": self.behind, "END": self.end}


# In capitals: a form's own texts. White space before {{- is dropped, so what stands before a line end is exact.
_ALL = 'eq .Role "system" "user" "assistant"'
_UNLESS_EMPTY = 'or (eq .Role "user" "assistant") (and (eq .Role "system") .Content)'
_EACH_TURN = """\
{{- $open := true }}
{{- range $i, $message := .Messages }}
{{- $open = ne .Role "assistant" }}
{{- if SHOWN }}BEFORE{{ .Role }}BEHIND{{ .Content }}
{{- if or $open (gt (len (slice $.Messages $i)) 1) }}END{{ end }}
{{- end }}
{{- end }}
{{- if $open }}BEFOREassistantBEHIND{{ end }}"""
_FOLDED = """\
{{- $system := "" }}
{{- range $i, $message := .Messages }}
{{- if and (eq .Role "system") .Content }}{{ $system = printf "%s%s\\n\\n" $system .Content }}
{{- else if eq .Role "user" }}BEFOREuserBEHIND{{ $system }}{{ .Content }}ENDBEFOREassistantBEHIND{{ $system = "" }}
{{- else if eq .Role "assistant" }}{{ .Content }}
{{- if gt (len (slice $.Messages $i)) 1 }}END{{ end }}
{{- end }}
{{- end }}"""
# A function is a name, a description and a schema in JSON; a call a name and arguments.
_GO_LIST = "<|tool|>[{{ range $n, $tool := $.Tools }}{{ if $n }}, {{ end }}{{ json $tool.Function }}{{ end }}]<|/tool|>"
_GO_CALL = '{"name": {{ json .Function.Name }}, "arguments": {{ json .Function.Arguments }}}'
_WITH_TOOLS = """\
{{- $open := true }}
{{- $told := not .Tools }}
{{- if and .Tools (not .System) }}BEFOREsystemBEHINDTOLDLISTEND{{ $told = true }}{{ end }}
{{- range $i, $message := .Messages }}
{{- $open = ne .Role "assistant" }}
{{- if eq .Role "tool" }}BEFOREtool_responseBEHIND{{ .Content }}END
{{- else if SHOWN }}BEFORE{{ .Role }}BEHIND{{ .Content }}
{{- if and (eq .Role "system") (not $told) }}LIST{{ $told = true }}{{ end }}
{{- if .ToolCalls }}<|tool_call|>[{{ range $n, $call := .ToolCalls }}{{ if $n }}, {{ end }}CALL{{ end }}]
{{- "" }}<|/tool_call|>{{ end }}
{{- if or $open (gt (len (slice $.Messages $i)) 1) }}END{{ end }}
{{- end }}
{{- end }}
{{- if $open }}BEFOREassistantBEHIND{{ end }}"""

FAMILY_TURNS = {
    "phi-3": Turns("<|", "|>\n", "<|end|>\n"),
    "phi-3.5": Turns("<|", "|>\n", "<|end|>\n", "unless empty"),
    "phi-3, April 2024": Turns("<|", "|>\n", "<|end|>\n", "folded"),
    "phi-4-mini": Turns("<|", "|>", "<|end|>", tools=True),
    "phi-4": Turns("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
}


def _talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


_TRIALS = (
    _talk("Hello"),
    _talk("Hello", "Hi.", "How are you?"),
    _talk("Hello", system="Be kind."),
    _talk("  two\nlines ", "Hi.", "", "Yes.\n", "So?", system="Be kind.\n\nBe brief."),
    _talk("Hello", system=""),
    [*_talk("Hello", "Hi."), *_talk("Go on.", system="Be brief.")],
)


def turns_of(tokenizer: Tokenizer) -> tuple[str, Turns] | None:
    """(name, form) of the one in `FAMILY_TURNS` that writes as the model's chat template does, but for BOS, or None."""
    try:
        wanted = [chat_text(tokenizer, trial) for trial in _TRIALS]
    except ChatError:
        return None
    bos = tokenizer.special_tokens.get("bos_token") or ""
    wanted = [text.removeprefix(bos) for text in wanted]
    return next(
        ((name, form) for name, form in FAMILY_TURNS.items() if list(map(form.render, _TRIALS)) == wanted),
        None,
    )
