"""What a run leaves to look at: metrics.jsonl, samples.jsonl, loss.png, TensorBoard files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..fields import parse
from ..files import json_text
from ..store.atomic import new_file, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS, SAMPLES, LOSS_PLOT = "metrics.jsonl", "samples.jsonl", "loss.png"
_FAR_APART = 100  # losses so far apart are drawn on a logarithmic axis


class StepLines:
    """Appends JSON objects that have a step to a file, one a line.

    A run that goes on from step `step` first forgets the lines of later steps, and what a killed run left half-written.
    Raises OSError.
    """

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_lines(path) if line["step"] <= step]
        replace_file(path, "".join(f"{json_text(line)}\n" for line in kept).encode())
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(f"{json_text(line)}\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)  # a full disk names none
            raise

    def close(self) -> None:
        self._file.close()


class Log:
    """metrics.jsonl in `directory`, of a run that goes on from step `step`, and the same for TensorBoard if wanted."""

    def __init__(self, directory: Path, step: int, tensorboard: bool):
        self._lines = StepLines(directory / METRICS, step)
        self._writer = _TensorBoard(directory / "tensorboard", step) if tensorboard else None

    def add(self, kind: str, step: int, **figures: Any) -> None:
        self._lines.add({"kind": kind, "step": step, **figures})
        if self._writer is not None:
            self._writer.add(step, {f"{kind}/{name}": float(value) for name, value in figures.items()})

    def close(self) -> None:
        self._lines.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. A loss that was not finite is None."""
    return [line for line in read_lines(directory / METRICS) if "kind" in line]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of `StepLines`; one that a killed run left half-written is left out."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            line = parse(text.decode())
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


class _TensorBoard:
    """Scalars in TensorBoard's event files; those of steps after `step`, of a killed run, are taken back."""

    def __init__(self, directory: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=restart))

    def add(self, step: int, figures: dict[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """OptionError unless TensorBoard can be imported."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise OptionError('TensorBoard is not installed; pip install "phi3-mlx[tensorboard]"') from error


def plot_losses(directory: Path, kept: int | None = None) -> bool:
    """Draw loss.png from metrics.jsonl; False where matplotlib is not installed or nothing was trained.

    `kept`: the step whose weights are, by loss or another figure, the best.
    """
    lines = read_metrics(directory)
    train, valid = _points(lines, "train"), _points(lines, "valid")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not train:
        return False
    with_rewards = any("reward_chosen" in line for line in lines)
    figure = Figure(figsize=(7, 10 if with_rewards else 4), layout="constrained")
    axes, *below = figure.subplots(3 if with_rewards else 1, sharex=True, squeeze=False)[:, 0]
    axes.plot(*zip(*train, strict=True), color="#9db4c0", linewidth=1, label="training")
    if valid:
        marked = [point for point in valid if point[0] == kept]
        label = "".join(f", best {loss:.3g} at step {step:,}" for step, loss in marked)
        axes.plot(*zip(*valid, strict=True), color="#c8553d", marker="o", markersize=3, label=f"validation{label}")
        for step, loss in marked:
            axes.plot([step], [loss], color="#c8553d", marker="o", markersize=7)
    losses = [loss for _, loss in train + valid]
    if min(losses) > 0 and max(losses) > _FAR_APART * min(losses):
        axes.set_yscale("log")
    axes.set_ylabel("loss" if with_rewards else "loss a token (nats)")
    axes.legend()
    for other, plot in zip(below, (_plot_rewards, _plot_answers), strict=False):
        plot(other, lines)
    (below[-1] if below else axes).set_xlabel("step")
    with new_file(directory / LOSS_PLOT) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def _plot_rewards(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Rewards of both answers and what is between them; how many pairs are right, on an axis of its own."""
    _plot_figures(axes, lines, {"chosen": "reward_chosen", "rejected": "reward_rejected", "margin": "margin"})
    axes.set_ylabel("reward")
    if right := _plot_right(axes, lines, "accuracy", "pairs right"):
        right.set_ylim(0, 1.02)
        right.set_ylabel("share of the pairs that are right")
    axes.legend()


def _plot_answers(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """How long both answers are, and on an axis of its own how far the model is from its reference, if it has one."""
    _plot_figures(axes, lines, {"chosen": "tokens_chosen", "rejected": "tokens_rejected"})
    axes.set_ylabel("tokens an answer")
    if right := _plot_right(axes, lines, "kl", "KL"):
        right.set_ylabel("KL to the reference (nats)")
    axes.legend()


def _plot_right(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str) -> Axes | None:
    """An axis on the right with a figure of the validation, or else of training; None where there is neither."""
    points = _points(lines, "valid", name) or _points(lines, "train", name)
    if not points:
        return None
    right = axes.twinx()
    style: Any = {"color": "#555555", "linestyle": ":", "label": label}
    right.plot(*zip(*points, strict=True), **style)
    axes.plot([], [], **style)  # in the legend, which is of one axis
    return right


def _plot_figures(axes: Axes, lines: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
    """Figures by what they are called, thin in training."""
    for (label, name), color in zip(names.items(), ("#2a9d8f", "#8d5a97", "#e9c46a"), strict=False):
        for kind, style in (("train", {"linewidth": 0.6, "alpha": 0.5}), ("valid", {"marker": "o", "markersize": 3})):
            if points := _points(lines, kind, name):
                shown = label if kind == "valid" or not _points(lines, "valid", name) else None
                axes.plot(*zip(*points, strict=True), color=color, label=shown, **style)


def _points(lines: Sequence[Mapping[str, Any]], kind: str, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of the lines of a kind in which it was a number."""
    pairs = [(line["step"], line.get(name)) for line in lines if line["kind"] == kind]
    return [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]
