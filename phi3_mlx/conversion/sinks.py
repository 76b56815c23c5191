"""Where a converted model goes: what takes the tensors of a layout one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .layout import Layout, Rounder
from .sources import Source


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: `done` of `total`, in `unit` ("layers", "tensors" or "tokens").

    `stage` is "measuring", "writing" or "comparing"; only writing counts bytes.
    """

    stage: str
    unit: str
    done: int
    total: int
    bytes: int = 0
    all_bytes: int = 0


class Sink(Protocol):
    """A model in the making. What is written counts once all three have been: extras, weights, config."""

    def write_extras(self, source: Source) -> None:
        """Write the source's tokenizer, chat template and the like. First, for the source may refuse them."""

    def write(self, layout: Layout, arrays: Rounder, progress: Callable[[Progress], None] | None = None) -> None:
        """Write what `arrays` makes of each entry of `layout`; what it takes is the memory of one entry."""

    def write_config(self, config: Mapping[str, Any], layout: Layout) -> None:
        """Write the keys of the unpacked model's config.json, and how the layout packs it."""
