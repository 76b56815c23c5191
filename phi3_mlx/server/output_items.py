"""The `output` of /v1/responses: items that grow, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from ..text.tool_calls import CallBegun, TextPiece
from .speech import Said

ItemEvent = tuple[str, dict[str, Any]]  # an event's name and fields


class OutputItems:
    """Messages of the assistant and function calls, in their order. `told`: the items so far; the last may grow."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self._scored: list[dict[str, Any]] = []  # tokens whose text has not come yet

    def add(self, said: list[Said], logprobs: list[dict[str, Any]]) -> Iterator[ItemEvent]:
        """What is said next; `logprobs` are of the tokens that say it."""
        self._scored += logprobs
        for event in said:
            if isinstance(event, TextPiece):
                if self._open != "message":
                    yield from self.end()
                    yield from self._begin_message()
                part = self.told[-1]["content"][0]
                logprobs, self._scored = self._scored, []
                part["text"] += event.text
                part["logprobs"] += logprobs
                yield "response.output_text.delta", {**self._part(), "delta": event.text, "logprobs": logprobs}
            elif isinstance(event, CallBegun):
                self._scored = []
                yield from self.end()
                yield from self._begin_call(event)
            else:
                self.told[-1]["arguments"] += event.text
                yield "response.function_call_arguments.delta", {**self._place(), "delta": event.text}

    def end(self, *, complete: bool = True) -> Iterator[ItemEvent]:
        """The end of the item that grows. `complete`: it was not cut."""
        if self._open is None:
            return
        item = self.told[-1]
        if self._open == "message":
            part = item["content"][0]
            part["logprobs"] += self._scored
            yield "response.output_text.done", {**self._part(), "text": part["text"], "logprobs": part["logprobs"]}
            yield "response.content_part.done", {**self._part(), "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._place(), **done}
        item["status"] = "completed" if complete else "incomplete"
        yield "response.output_item.done", {"output_index": len(self.told) - 1, "item": item}

    def finish(self, *, complete: bool) -> Iterator[ItemEvent]:
        """The end of the answer; one that says nothing is an empty message."""
        if not self.told:
            yield from self._begin_message()
        yield from self.end(complete=complete)

    @property
    def _open(self) -> str | None:
        """The type of the item that grows."""
        return self.told[-1]["type"] if self.told and self.told[-1]["status"] == "in_progress" else None

    def _begin_message(self) -> Iterator[ItemEvent]:
        yield self._begun({"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "content": []})
        self.told[-1]["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "response.content_part.added", {**self._part(), "part": empty}

    def _begin_call(self, call: CallBegun) -> Iterator[ItemEvent]:
        names = {"call_id": call.id, "name": call.name, "arguments": ""}
        yield self._begun({"id": f"fc_{uuid4().hex}", "type": "function_call", **names})

    def _begun(self, item: dict[str, Any]) -> ItemEvent:
        self.told.append({**item, "status": "in_progress"})
        return "response.output_item.added", {"output_index": len(self.told) - 1, "item": {**self.told[-1]}}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.told[-1]["id"], "output_index": len(self.told) - 1}

    def _part(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}
