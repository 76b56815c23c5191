"""How a model is told of tools, how it calls them, and how it gets their results.

A model that was trained for tools (Phi-4-mini) has tokens for that, and its chat template a place:

    <|system|>You are ...<|tool|>[{"name": ..., "description": ..., "parameters": {...}}]<|/tool|><|end|>
    <|assistant|><|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|><|end|>
    <|tool_response|>a result<|end|>

Microsoft documents the first two. Nothing says how results are returned; the vocabulary has a token for them. Any other
model gets the list in its system message and is asked for `{"tool_calls": [...]}` in place of a text; results come as
a user's message, `{"tool_results": [...]}`. That rests on the constraint, not on training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .call_marks import CLOSE, OPEN
from .chat import render_chat
from .grammar import Form
from .messages import RESULT, Message
from .tokenizer import Tokenizer
from .tool_calls import ToolCallParser, new_id
from .tool_grammar import MOST_CALLS, CallForm
from .tool_messages import as_plain_text, called
from .tools import Tool, ToolChoice, read_choice, read_tools

_TRAINED_SYSTEM = "You are a helpful assistant with some tools."
_PLAIN_SYSTEM = """\
You can call these functions; "parameters" is the JSON schema of a function's arguments:
{}
To call functions, answer with JSON alone, in this form: {{"tool_calls": [{{"name": NAME, "arguments": {{...}}}}]}}
You are then told their results. Call functions only where you need them; otherwise answer in plain text."""


@dataclass(frozen=True)
class ToolUse:
    """The tools of a conversation with a model, and what is asked of its next answer.

    `choice`: "auto" (text or calls), "none" (text), "required" (calls), or the name of the tool to call, once.
    `parallel`: whether an answer may have several calls. `trained`: whether the model was trained for tools.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice
    parallel: bool
    trained: bool

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Message], notify: Callable[[str], None] | None = None
    ) -> list[int]:
        """The ids of a prompt of messages that may have `tool_calls` and results. Raises ChatError."""
        tools = [tool.listing for tool in self.tools] if self.trained else None
        return render_chat(tokenizer, self.messages(messages), tools=tools, notify=notify)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the model knows them: calls and results as texts, and, unless `trained`, the tools too.

        An assistant's message may have `tool_calls` in OpenAI's form, and no content. A message of the role "tool" is
        the result of a call before it, which its `tool_call_id` names; without an id, results come in the calls' order.
        Raises ChatError for malformed calls, and for a result of no call.
        """
        told = called(messages)
        if self.trained:
            told = [self._as_trained(message) for message in told]
            first = [] if not self.tools or any(message["role"] == "system" for message in told) else [_TRAINED_SYSTEM]
            return [*({"role": "system", "content": text} for text in first), *told]
        return self._with_list(as_plain_text(told))

    def form(self, text: Form | None = None) -> Form | None:
        """What the next answer must be; `text`: what it must be where it is no call. Raises OptionError."""
        if not self.tools:
            return text
        if text and not self.trained and self.choice == "auto":
            raise OptionError(
                f"{text.kind} has no place beside tools with a model that was not trained for tools, because its calls "
                "are JSON in place of a text; leave one out"
            )
        if text and self.choice == "none":
            return text
        least = 0 if self.choice in ("auto", "none") else 1
        named = self.choice not in ("auto", "none", "required")
        most = 0 if self.choice == "none" else 1 if named or not self.parallel else MOST_CALLS
        tools = [tool for tool in self.tools if not named or tool.name == self.choice]
        schemas = ((tool.name, json.dumps(_closed(tool.parameters), ensure_ascii=False)) for tool in tools)
        return Form("tools", str(CallForm(tuple(schemas), self.trained, least, most, text)))

    def parser(self, make_id: Callable[[], str] = new_id) -> ToolCallParser:
        """A parser for the next answer."""
        return ToolCallParser([tool.name for tool in self.tools], make_id)

    def _as_trained(self, message: dict[str, Any]) -> dict[str, Any]:
        calls = message.pop("tool_calls", None)
        if calls:
            return {**message, "content": f"{message['content']}{OPEN}[{', '.join(calls)}]{CLOSE}"}
        if message["role"] == "tool":
            return {"role": RESULT, "content": message["content"]}
        return message

    def _with_list(self, messages: list[dict[str, Any]]) -> list[Message]:
        if not self.tools:
            return [*messages]
        listed = "\n".join(json.dumps(tool.listing, ensure_ascii=False) for tool in self.tools)
        text = _PLAIN_SYSTEM.format(listed)
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        first = {**messages[0], "content": "\n\n".join(filter(None, [messages[0]["content"], text]))}
        return [first, *messages[1:]]


def use_tools(tokenizer: Tokenizer, tools: Any, choice: Any = "auto", parallel: bool = True) -> ToolUse:
    """The tools, in any form that `read_tools` takes, and how this tokenizer's model uses them. Raises OptionError."""
    known = read_tools(tools)
    return ToolUse(tuple(known), read_choice(choice, known), parallel, trained_for_tools(tokenizer))


def trained_for_tools(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the tokens of Phi-4-mini's calls, and the chat template reads tools."""
    template = tokenizer.chat_template
    there = all(token in tokenizer.added_tokens for token in (OPEN, CLOSE, "<|tool|>", "<|/tool|>"))
    return there and (template is None or "tools" in template)


# Keywords that say which keys an object may have beside its own.
_OPENING = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without arguments that it does not name, unless it speaks of others."""
    if any(keyword in schema for keyword in _OPENING):
        return schema
    return {"properties": {}, **schema, "additionalProperties": False}
