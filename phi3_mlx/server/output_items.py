"""The `output` of /v1/responses: items that grow, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

Told = tuple[str, dict[str, Any]]  # an event's name and fields


class OutputItems:
    """A message of the assistant, as it is said. `told`: the items so far."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Told]:
        """More text of the message."""
        if not text and not logprobs:
            return
        yield from self._message()
        part = self.told[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield "response.output_text.delta", {**self._place(), "delta": text, "logprobs": logprobs}

    def end(self, *, complete: bool) -> Iterator[Told]:
        """The end of the last item; of an answer without one, an empty message."""
        yield from self._message()
        item = self.told[-1]
        part = item["content"][0]
        yield "response.output_text.done", {**self._place(), "text": part["text"], "logprobs": part["logprobs"]}
        yield "response.content_part.done", {**self._place(), "part": {**part}}
        item["status"] = "completed" if complete else "incomplete"
        yield "response.output_item.done", {"output_index": len(self.told) - 1, "item": item}

    def _message(self) -> Iterator[Told]:
        """A message, unless the last item is one that still grows."""
        if self.told and self.told[-1]["status"] == "in_progress":
            return
        item: dict[str, Any] = {
            "id": f"msg_{uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self.told.append(item)
        yield "response.output_item.added", {"output_index": len(self.told) - 1, "item": {**item, "content": []}}
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        yield "response.content_part.added", {**self._place(), "part": {**part, "logprobs": []}}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.told[-1]["id"], "output_index": len(self.told) - 1, "content_index": 0}
