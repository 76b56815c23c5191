"""Checkpoints of a run: all it needs to go on as if it had never stopped, written whole or not at all.

    ADAPTER/checkpoints/step-00000120/   weights.safetensors   optimizer.safetensors   state.json

A checkpoint appears when the disk has all of it; then older ones are removed. What is drawn at random in a step
(examples, dropout) follows from the seed and the step's number, so the step is the state of the generator and the place
in the data.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import read_json
from ..errors import CheckpointError, TrainingError
from ..fields import Fields, shorten
from ..files import json_text
from ..store.atomic import new_directory
from ..store.checkpoint import read_arrays
from ..store.safetensors import read_header

_NAME = re.compile(r"step-(\d{8})")
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, mx.array],
    optimizer: Mapping[str, mx.array],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of a step into `folder` and remove older ones. Raises TrainingError: older ones are kept."""
    final = folder / _name(step)
    way_out = "fix that and continue with resume=True" if _all(folder) else None
    # One of this step may be there, of a run that was resumed from before it.
    with new_directory(final, force=True, mark=_STATE, fault=TrainingError, way_out=way_out) as unfinished:
        for name, arrays in ((_WEIGHTS, weights), (_OPTIMIZER, optimizer)):
            with (unfinished / name).open("wb") as file:
                mx.save_safetensors(file, dict(arrays))
        (unfinished / _STATE).write_text(json_text({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    for other in _all(folder):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint, or None."""
    return max(_all(folder), default=None)


def _all(folder: Path) -> list[Path]:
    folders = folder.glob("step-*") if folder.is_dir() else ()
    return [path for path in folders if _NAME.fullmatch(path.name)]


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, mx.array], Fields]:
    """(weights, optimizer, state) of a checkpoint. Raises TrainingError if it is damaged, or holds NaN.

    What is taken from the state raises it too.
    """
    advice = f"remove {path} and start over"
    try:
        weights, optimizer = _read_arrays(path / _WEIGHTS), _read_arrays(path / _OPTIMIZER)
        state = Fields(read_json(path / _STATE), path / _STATE, TrainingError, advice)
    except CheckpointError as error:
        why = str(error).removesuffix("; download it again").removesuffix("; download the file again")
        raise TrainingError(f"{path} is damaged ({why}); {advice}") from error
    if path.name != _name(state.whole("step")):
        state.fail("step", f"that of {path.name}")
    return weights, optimizer, state


def _read_arrays(path: Path) -> dict[str, mx.array]:
    read_header(path)
    arrays = read_arrays(path)
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)):
            raise CheckpointError(f"{path} has {shorten(name, quote=False)}, whose numbers are not all finite")
    return arrays


def _name(step: int) -> str:
    return f"step-{step:08d}"
