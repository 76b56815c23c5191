"""Where a converted model goes: what takes the tensors of a layout one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .layout import Layout, Rounder
from .sources import Source


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: `done` of `total`, in `unit` ("layers", "tensors", "tokens", "steps" and the like).

    `stage` is "writing a text", "measuring", "packing", "distilling", "writing" or "comparing"; packing and writing
    count bytes.
    """

    stage: str
    unit: str
    done: int
    total: int
    bytes: int = 0
    all_bytes: int = 0


def staged(progress: Callable[[Progress], None] | None, stage: str, unit: str) -> Callable[[int, int], None] | None:
    """A callback for (done, total) that reports them to `progress` as this stage."""
    if progress is None:
        return None
    return lambda done, total: progress(Progress(stage, unit, done, total))


class Sink(Protocol):
    """A model in the making, which `write_model` completes."""

    def check_space(self, nbytes: int) -> None:
        """CheckpointError unless there is room for that many bytes of weights."""

    def write_extras(self, source: Source) -> None:
        """Write the source's tokenizer, chat template and the like. CheckpointError for what is not its own."""

    def write(self, layout: Layout, arrays: Rounder, progress: Callable[[Progress], None] | None = None) -> None:
        """Write what `arrays` makes of each entry of `layout`; takes the memory of one entry."""

    def write_config(self, config: Mapping[str, Any], layout: Layout) -> None:
        """Write the keys of the dequantized model's config.json, and how the layout packs it."""


def write_model(
    sink: Sink,
    source: Source,
    layout: Layout,
    arrays: Rounder,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write all of a model. The config comes last: a model without one is not complete.

    Raises CheckpointError for extras that are not the source's own, for want of space, and what `arrays` raises.
    """
    sink.write_extras(source)
    sink.check_space(layout.nbytes)
    sink.write(layout, arrays, progress)
    sink.write_config(source.raw_config, layout)
