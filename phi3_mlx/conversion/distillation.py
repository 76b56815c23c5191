"""Method "distill": GPTQ, then the packed model's scales and biases trained towards the source.

What takes long stands in a folder beside the model until the model is there (`unfinished`): layers that GPTQ has
fitted, the packed model after that, the source's next-token distributions, and a checkpoint of the training. The same
command goes on from there.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx

from .. import __version__
from ..config import read_json
from ..errors import PromptError
from ..store.atomic import new_directory
from ..store.checkpoint import read_array
from ..store.safetensors import find_weights
from .calibrating import GPTQ_WINDOW, Calibration, MatrixFit, Stored, calibrated
from .endtoend import STUDENT_SETTINGS, Student
from .gains import Gain
from .layerwise import LayerStream
from .layout import Entry, Layout, Rounder
from .sinks import Progress
from .sources import Source, source_digest
from .targets import HELD_OUT
from .teacher import read_teacher, write_teacher
from .unfinished import CHECKPOINT, FITTED, PACKED, TEACHER, claim
from .writer import DirectorySink, write_json

_FITS = "fits.json"  # in the packed model's folder
_LEAST_TOKENS = HELD_OUT * GPTQ_WINDOW  # of which one window is held out


def distilled(
    source: Source,
    layout: Layout,
    ids: Sequence[int],
    folder: Path,
    *,
    stored: Stored | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Rounder, tuple[MatrixFit, ...], Gain]:
    """The rounder whose packed model was trained towards `source` on a text; what fitting and training gave.

    `ids`: the text, every fourth window of which is held out. `stored`: what is packed already, for `calibrated`; all
    of it is trained. `folder` keeps what is done; it goes on from there. Source and packed model are never in
    memory together. Raises OptionError for a folder of a run with other arguments, unless `force`, PromptError for a
    text of fewer than four windows, and what `calibrated` raises.
    """
    check_is_long_enough(len(ids))
    claim(folder, _key(source, layout, ids), force)
    packed = folder / PACKED
    if not packed.exists():
        calibration = calibrated(source, layout, ids, stored=stored, folder=folder / FITTED)
        _pack(calibration, source, layout, folder, progress)
        del calibration
        gc.collect()
        mx.clear_cache()
    shutil.rmtree(folder / FITTED, ignore_errors=True)  # all of it is in the packed model
    weights = find_weights(packed)
    training = Student(source.config, {name: read_array(weights, name) for name in layout.stored}, layout.packings)

    def steps(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("distilling", "steps", done, total))

    gain = training.train(read_teacher(folder / TEACHER), folder / CHECKPOINT, steps)

    def trained(entry: Entry) -> list[mx.array]:
        if entry.name in training.trained:
            return training.trained[entry.name].parts()
        return [read_array(weights, name) for name in entry.stored]

    return trained, tuple(MatrixFit(**fit) for fit in read_json(packed / _FITS)["fits"]), gain


def check_is_long_enough(tokens: int) -> None:
    """PromptError for a text of so few tokens that none can be held out."""
    if tokens < _LEAST_TOKENS:
        raise PromptError(
            f"the calibration text has {tokens:,} tokens, and distilling needs {_LEAST_TOKENS:,}; give a longer one"
        )


def _pack(
    calibration: Calibration,
    source: Source,
    layout: Layout,
    folder: Path,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Write the packed model after GPTQ, and the source's distributions."""

    def tell(now: Progress) -> None:
        if progress is not None:
            progress(replace(now, stage="packing"))

    with new_directory(folder / PACKED, mark=_FITS) as packed:
        DirectorySink(packed).write(layout, calibration, tell)
        write_teacher(folder / TEACHER, LayerStream(source), calibration.source_hidden, *calibration.text)
        write_json(packed / _FITS, {"fits": [asdict(fit) for fit in calibration.fits]})


def _key(source: Source, layout: Layout, ids: Sequence[int]) -> str:
    """Tells runs apart: by version, text, layout and weights, all of which are read: that is soon done."""
    return source_digest(source, [__version__, STUDENT_SETTINGS, list(ids), layout.recipe])
