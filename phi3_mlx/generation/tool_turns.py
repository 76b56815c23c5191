"""A turn of a conversation in which the model may call tools: what is run, how often, and what the model is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import values
from ..text.grammar import Form
from ..text.python_values import as_result
from ..text.tool_calls import ToolCall
from ..text.tool_use import ToolUse

TOOL_ROUNDS = 8
ToolCaller = Callable[[ToolCall], Any]


@dataclass(frozen=True)
class ToolTurn:
    """The tools of a turn. `run` gives a call's result; without it each tool's own function does.

    `rounds`: how often the model may call before it must answer in text.
    """

    use: ToolUse
    run: ToolCaller | None = None
    rounds: int = TOOL_ROUNDS
    notify: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        values.check_function(self.run, "run_tool")
        if values.whole(self.rounds, "tool_rounds") < 1:
            raise values.refusal(self.rounds, "tool_rounds", "1 or more")

    def use_in(self, number: int) -> ToolUse:
        """What is asked of the answer of a round, from 0: calls are demanded in the first, and none are in the last."""
        if number == 0:
            return self.use
        return replace(self.use, choice="none" if number >= self.rounds or self.use.choice == "none" else "auto")

    def forms(self, text: Form | None) -> list[Form]:
        """What the first answer must be, and one behind a call's result; `text`: what their text must be.

        Raises OptionError.
        """
        return [form for number in (0, 1) if (form := self.use_in(number).form(text))]

    def runs(self, calls: Sequence[ToolCall]) -> bool:
        """Whether there is something that runs each of the calls."""
        able = {tool.name for tool in self.use.tools if tool.function is not None}
        return bool(calls) and (self.run is not None or able.issuperset(call.name for call in calls))

    def result(self, call: ToolCall) -> dict[str, Any]:
        """The message with a call's result. What goes wrong is told to the model, and to `notify`."""
        try:
            content = as_result(self._run(call))
        except Exception as error:  # a tool may fail in any way
            fault = f"{type(error).__name__}: {error}"
            content = json.dumps({"error": fault}, ensure_ascii=False)
            if self.notify:
                self.notify(f"the tool {call.name} failed, which the model was told: {' '.join(fault.split())}")
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}

    def _run(self, call: ToolCall) -> Any:
        if self.run is not None:
            return self.run(call)
        tool = next(tool for tool in self.use.tools if tool.name == call.name)
        return tool.call(call.arguments)
