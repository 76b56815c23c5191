"""What a run leaves to look at: metrics.jsonl, loss.png, TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from ..atomic import new_file, replace_file
from ..errors import OptionError

METRICS, PLOT = "metrics.jsonl", "loss.png"
_FAR_APART = 100  # losses so far apart are drawn on a logarithmic axis


class Log:
    """Appends to `directory`/metrics.jsonl: one JSON object a step or validation.

    A run that goes on from step `step` first forgets the lines of later steps.
    """

    def __init__(self, directory: Path, step: int, tensorboard: bool):
        path = directory / METRICS
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._writer = _tensorboard_writer(directory / "tensorboard") if tensorboard else None

    def add(self, kind: str, step: int, **figures: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        self._file.flush()
        if self._writer is not None:
            self._writer.add(step, {f"{kind}/{name}": float(value) for name, value in figures.items()})

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a killed run left half-written is left out."""
    lines = []
    path = directory / METRICS
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class _TensorBoard:
    """Scalars in TensorBoard's event files."""

    def __init__(self, directory: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))

    def add(self, step: int, figures: dict[str, float]) -> None:
        import time

        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _tensorboard_writer(directory: Path) -> _TensorBoard:
    try:
        return _TensorBoard(directory)
    except ImportError as error:
        raise OptionError('TensorBoard is not installed; pip install "phi3-mlx[tensorboard]"') from error


def plot_losses(directory: Path) -> bool:
    """Draw loss.png from metrics.jsonl; False where matplotlib is not installed or nothing was trained."""
    lines = read_metrics(directory)
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    valid = [(line["step"], line["loss"]) for line in lines if line["kind"] == "valid"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not train:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="#9db4c0", linewidth=1, label="training")
    if valid:
        step, best = min(valid, key=lambda point: point[1])
        label = f"validation, best {best:.3g} at step {step:,}"
        axes.plot(*zip(*valid, strict=True), color="#c8553d", marker="o", markersize=3, label=label)
        axes.plot([step], [best], color="#c8553d", marker="o", markersize=7)
    losses = [loss for _, loss in train + valid]
    if min(losses) > 0 and max(losses) > _FAR_APART * min(losses):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss a token (nats)")
    axes.legend()
    with new_file(directory / PLOT) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
