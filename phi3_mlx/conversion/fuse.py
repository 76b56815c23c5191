"""Merges an adapter into its model, and measures how much of its effect is left.

In floats the changed weight is computed in float32 and rounded once. If the weight is quantized again the change may
vanish: it is often smaller than half the step between two quantized values.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import values
from ..adapters.config import adapter_kind
from ..adapters.folder import base_of, check_base, load_full, make_adapters, read_adapter, trained_on
from ..adapters.lora import Adapter
from ..errors import OptionError
from ..option import arguments
from ..store import hub
from ..store.atomic import check_destination, new_directory
from ..store.checkpoint import open_checkpoint, outline, read_model
from .adapted import AdaptedSource
from .directory import DirectorySource
from .effect import Effect
from .options import FuseOptions
from .planning import check_fusion
from .rounding import rounded
from .sinks import write_model
from .writer import DirectorySink

ENOUGH = 0.9  # of an adapter's effect; below it the merged model is no longer what was trained


@dataclass(frozen=True)
class Fused:
    """What `fuse` has made. `survived` is the share of the adapter's effect on the text's log-probabilities that the
    packed model has (1: all; 0: none; less: the noise is larger); None for a model in floats, which has it all."""

    path: Path
    packed: bool
    layers: int
    survived: float | None


def fuse(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    bits: int | None = None,
    text: str | None = None,
    force: bool = False,
) -> Fused:
    """Write `output`: the model with the adapter's changes in its weights.

    `model` is what the adapter was trained on, by default under the name that it was given then.
    A model in floats is written in `dtype` (its own by default). A packed one is packed again as it was, the changed
    layers in `bits` if given (5, 6 or 8 keep more of the adapter), or written in floats with `dequantize`. `text` is
    what the measurement reads, a bundled sample by default. A matrix is in memory at a time, and for the measurement
    the whole model; what the memory at hand cannot hold is refused before any of it is read. `force` replaces what is
    there, and refuses nothing for memory. Raises AdapterError, OptionError, MemoryLimitError and what `load` raises.
    """
    return fuse_as(adapter, output, FuseOptions(**arguments(FuseOptions, locals())))


def fuse_as(adapter: str | Path, output: str | Path, options: FuseOptions) -> Fused:
    """`fuse`, with all options at once."""
    folder, destination = Path(values.path(adapter, "adapter")).expanduser(), Path(values.path(output, "output"))
    model, revision, text, force = options.model, options.revision, options.text, options.force
    check_destination(destination, force=force)
    tensors, config = read_adapter(folder)
    if model is None:
        model, revision = trained_on(folder, config, revision)
    directory = hub.resolve(model, revision)
    opened, checkpoint = DirectorySource(directory), open_checkpoint(directory)
    base = base_of(checkpoint, model, revision)
    check_base(folder, config, base)
    shapes = outline(checkpoint)
    adapters: Mapping[str, Adapter] = {}
    replaced: Mapping[str, mx.array] = {}
    if adapter_kind(folder, config) == "full":
        load_full(shapes, folder, tensors)
        replaced = tensors
    else:
        adapters = make_adapters(folder, tensors, config, shapes)
    source = AdaptedSource(
        opened,
        dequantize=options.dequantize,
        dtype=options.dtype,
        bits=options.bits,
        adapters=adapters,
        replaced=replaced,
    )
    layout = source.layout()
    if text is not None and not source.rounds_adapters:
        raise OptionError("text has no effect where nothing is packed, since nothing is measured; leave it out")
    if not force:
        check_fusion(folder, checkpoint, source, layout, sum(array.nbytes for array in tensors.values()))
    effect = Effect(checkpoint, base, folder, text) if source.rounds_adapters else None
    gc.collect()
    mx.clear_cache()
    with new_directory(destination, force=force) as unfinished:
        write_model(DirectorySink(unfinished, destination), source, layout, rounded(source))
        survived = None if effect is None else effect.survived(read_model(unfinished))
    changed = len(adapters) or len(replaced)
    return Fused(Path(os.path.abspath(destination)), source.stays_packed, changed, survived)
