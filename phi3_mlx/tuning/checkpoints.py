"""Checkpoints of a run: all it needs to go on as if it had never stopped, written whole or not at all.

    ADAPTER/checkpoints/step-00000120/   weights.safetensors   optimizer.safetensors   state.json

A checkpoint appears when the disk has all of it; then older ones are removed. What is drawn at random in a step
(examples, dropout) follows from the seed and the step's number, so the step is the state of the generator and the place
in the data.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..atomic import new_directory
from ..errors import TrainingError
from ..files import json_text

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
    final = folder / f"step-{step:08d}"
    way_out = "mend that and go on with resume=True" if _all(folder) else None
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
    found = folder.glob("step-*") if folder.is_dir() else ()
    return [path for path in found if _NAME.fullmatch(path.name)]


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
    """(weights, optimizer, state) of a checkpoint. Raises TrainingError if it is damaged."""
    try:
        weights: dict[str, mx.array] = mx.load(str(path / _WEIGHTS))  # type: ignore[assignment]
        optimizer: dict[str, mx.array] = mx.load(str(path / _OPTIMIZER))  # type: ignore[assignment]
        mx.eval(weights, optimizer)
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{path} is damaged ({' '.join(str(error).split())}); remove it and start anew") from error
    return weights, optimizer, state
