"""Merges an adapter into its model, and measures how much of its effect is left.

In floats the changed weight is computed in float32 and rounded once. If the weight is quantized again the change may
vanish: it is often smaller than half the step between two quantized values.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from .. import values
from ..adapters.config import adapter_kind
from ..adapters.folder import Base, base_of, check_base, load_full, make_adapters, read_adapter, trained_on
from ..adapters.lora import Adapter
from ..errors import OptionError
from ..option import arguments
from ..paths import expanded
from ..store import hub
from ..store.atomic import check_apart, check_destination, new_directory
from ..store.checkpoint import Checkpoint, open_checkpoint, outline, read_model
from .adapted import AdaptedSource
from .calibrating import Stored, calibrated_in, check_grids
from .directory import DirectorySource
from .distillation import check_is_long_enough, distilled
from .effect import Effect
from .fitted_text import FittedText
from .gains import Gain
from .layout import Layout, Rounder
from .options import FuseOptions
from .planning import check_fusion, check_own_text, check_training, kept_on_disk
from .rounding import rounded
from .sinks import Progress, staged, write_model
from .texts import bundled
from .unfinished import asked_digest, claim, left_to_keep, unfinished_for
from .writer import DirectorySink

ENOUGH = 0.9  # of an adapter's effect; below it the merged model is no longer what was trained


@dataclass(frozen=True)
class Fused:
    """What `fuse` has made. `survived` is the share of the adapter's effect on the text's log-probabilities that the
    packed model has (1: all; 0: none; less: the noise is larger); None for a model in floats, which has it all. `seen`:
    whether that text, or much of it, is also the one that the weights were fitted to. `gain`: what the training of
    method "distill" gave."""

    path: Path
    packed: bool
    layers: int
    survived: float | None
    seen: bool = False
    gain: Gain | None = None


@dataclass(frozen=True)
class Merge:
    """An adapter and the model that it changes: LoRA factors by layer path, or whole tensors that replace its own.

    `base` says which weights these are; `nbytes` is what the adapter's tensors take.
    """

    source: DirectorySource
    checkpoint: Checkpoint
    base: Base
    adapters: Mapping[str, Adapter]
    replaced: Mapping[str, mx.array]
    nbytes: int


def fuse(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    bits: int | None = None,
    method: Literal["round", "gptq", "distill"] = FuseOptions.method,
    calibration: str | None = None,
    seed: int | None = None,
    text: str | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Fused:
    """Write `output`: the model with the adapter's changes in its weights.

    `model` is what the adapter was trained on, by default under the name that it was given then.
    A model in floats is written in `dtype` (its own by default). A packed one is packed again as it was, the changed
    layers in `bits` if given (5, 6 or 8 keep more of the adapter), or written in floats with `dequantize`. `method`
    "gptq" packs the changed layers so that the outputs on `calibration` change least, which keeps more of the adapter:
    a bundled text by default, better one of the adapter's task, or "self", which the model with the adapter writes with
    `seed`. "distill" then trains the scales and biases of all layers towards the model in floats. Both go on where the
    same call was cut. `text` is what the measurement reads, a bundled sample by default. `progress` is called after
    each tensor, step and part.

    A matrix is in memory at a time, a layer where a text is read, and for the measurement, the training and the model's
    own text the whole model; what the memory at hand cannot hold is refused before any of it is read. `force` replaces
    what is there, and refuses nothing for memory. Raises AdapterError, OptionError, MemoryLimitError and what `load`
    raises.
    """
    return fuse_as(adapter, output, FuseOptions(**arguments(FuseOptions, locals())), progress)


def fuse_as(
    adapter: str | Path,
    output: str | Path,
    options: FuseOptions,
    progress: Callable[[Progress], None] | None = None,
) -> Fused:
    """`fuse`, with all options at once."""
    folder, destination = expanded(values.path(adapter, "adapter")), Path(values.path(output, "output"))
    values.check_function(progress, "progress")
    model, revision, text, force = options.model, options.revision, options.text, options.force
    check_apart(destination, folder, "the adapter")
    check_destination(destination, force=force)
    merge = open_merge(folder, model, revision)
    check_apart(destination, merge.checkpoint.directory, "the model")
    source = AdaptedSource(
        merge.source,
        dequantize=options.dequantize,
        dtype=options.dtype,
        bits=options.bits,
        adapters=merge.adapters,
        replaced=merge.replaced,
    )
    layout, fitted_to = source.layout(), None
    if text is not None and not source.rounds_adapters:
        raise OptionError("text has no effect where nothing is packed, since nothing is measured; leave it out")
    if options.method != "round":
        if not source.rounds_adapters:
            raise OptionError(f"method='{options.method}' has no effect where nothing is packed again; leave it out")
        layout = _in_model_order(layout, merge.source)
        check_grids(layout)
        fitted_to = FittedText(source, options.calibration, options.seed)
        if options.method == "distill":
            check_is_long_enough(fitted_to.tokens)
    if not force:
        _check_memory(folder, merge, source, layout, fitted_to, options)
    effect = Effect(merge.checkpoint, merge.base, folder, text) if source.rounds_adapters else None
    gc.collect()
    mx.clear_cache()
    with unfinished_for(options.method, destination) as work, new_directory(destination, force=force) as directory:
        sink = DirectorySink(directory, destination)
        tokens = 0 if fitted_to is None else fitted_to.tokens
        kept = kept_on_disk(source, layout, layout.nbytes, tokens, options.method)
        sink.check_space(layout.nbytes, left_to_keep(work, kept))
        rounder, gain = _rounder(source, layout, fitted_to, options.method, work, force, progress)
        write_model(sink, source, layout, rounder, progress)
        survived = None if effect is None else effect.survived(read_model(directory))
    changed = len(merge.adapters) or len(merge.replaced)
    seen = fitted_to is not None and fitted_to.holds(bundled("sample") if text is None else text)
    return Fused(Path(os.path.abspath(destination)), source.stays_packed, changed, survived, seen, gain)


def _check_memory(
    folder: Path,
    merge: Merge,
    source: AdaptedSource,
    layout: Layout,
    fitted_to: FittedText | None,
    options: FuseOptions,
) -> None:
    """MemoryLimitError for what this machine cannot hold, before any of it is read."""
    tokens = 0 if fitted_to is None else fitted_to.tokens
    kept = check_fusion(folder, merge.checkpoint, source, layout, merge.nbytes, tokens)
    if fitted_to is not None and fitted_to.is_own:
        check_own_text(source, kept)
    if options.method == "distill":
        check_training(source, layout, tokens, kept)


def _rounder(
    source: AdaptedSource,
    layout: Layout,
    fitted_to: FittedText | None,
    method: str,
    work: Path | None,
    force: bool,
    progress: Callable[[Progress], None] | None,
) -> tuple[Rounder, Gain | None]:
    """What packs the changed layers, and with "distill" trains all; what training gave. `work` keeps what is done."""
    if fitted_to is None:
        return rounded(source), None
    assert work is not None
    claim(work, asked_digest(source, layout, method, fitted_to.asked), force, name="asked")
    fitted_to.make(work, force=force, progress=staged(progress, "writing a text", "tokens"))
    stored = Stored(source.blocks, source.before)
    if method == "gptq":
        return calibrated_in(work, source, layout, fitted_to.ids, stored=stored, force=force), None
    rounder, _, gain = distilled(source, layout, fitted_to.ids, work, stored=stored, force=force, progress=progress)
    return rounder, gain


def _in_model_order(layout: Layout, base: DirectorySource) -> Layout:
    """The layout in the order in which a text goes through it, whatever that of the base's files is."""
    entries = {entry.name: entry for entry in layout.entries}
    if entries.keys() != base.tensors.keys():
        raise OptionError(f"{base.name} has its projections apart, where only method='round' packs; convert it first")
    return Layout(tuple(entries[name] for name in base.tensors), layout.recipe)


def open_merge(folder: Path, model: str | None, revision: str | None) -> Merge:
    """The adapter in `folder` and what it was trained on: `model`, or what it names. Raises AdapterError."""
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
    return Merge(opened, checkpoint, base, adapters, replaced, sum(array.nbytes for array in tensors.values()))
