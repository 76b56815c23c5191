"""Checkpoints of a run: all it needs to go on as if it had never stopped, written whole or not at all.

    ADAPTER/checkpoints/step-00000120/   weights.safetensors   optimizer.safetensors   state.json

A checkpoint is written under another name and renamed when the disk has all of it; then older ones are removed. What
is drawn at random in a step (examples, dropout) follows from the seed and the step's number, so the step is the state
of the generator and the place in the data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..atomic import sync
from ..errors import TrainingError

_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, mx.array],
    optimizer: Mapping[str, mx.array],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of a step into `folder` and remove older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".writing-{step:08d}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    mx.save_safetensors(str(unfinished / "weights.safetensors"), dict(weights))
    mx.save_safetensors(str(unfinished / "optimizer.safetensors"), dict(optimizer))
    (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    sync(unfinished)
    shutil.rmtree(final, ignore_errors=True)  # of a run that was resumed from before this step
    unfinished.rename(final)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint, or None."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, default=None)


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
    """(weights, optimizer, state) of a checkpoint. Raises TrainingError if it is damaged."""
    try:
        weights: dict[str, mx.array] = mx.load(str(path / "weights.safetensors"))  # type: ignore[assignment]
        optimizer: dict[str, mx.array] = mx.load(str(path / "optimizer.safetensors"))  # type: ignore[assignment]
        mx.eval(weights, optimizer)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{path} is damaged ({' '.join(str(error).split())}); remove it and start anew") from error
    return weights, optimizer, state
