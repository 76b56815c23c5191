"""What is known of a model, an adapter or GGUF files: from the files that convert, tune, export and eval have left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.config import adapter_kind
from ..config import read_json
from ..conversion.opening import AboutGguf, about_gguf
from ..errors import CheckpointError
from ..fields import Fields
from ..store import hub
from .contents import Contents

_FAMILY = ("microsoft/phi-", "mlx-community/phi-")  # the repositories whose weights have Microsoft's MIT licence
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HUB = "https://huggingface.co/"
_LATER_PART = re.compile(r"(.+)-(?!00001-)\d{5}-of-(\d{5})\.gguf")
_SETTINGS = ("rank", "alpha", "scale", "rslora", "step")
# Of a run's settings those that a reader of the card asks for; and of them those that one objective alone has.
_RUN_SETTINGS = (
    *("objective", "beta", "dpo_loss", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight"),
    *("train_on", "epochs", "steps", "batch_size", "learning_rate", "schedule", "optimizer", "max_length", "seed"),
)
_OF_OBJECTIVE = {
    "dpo_loss": "dpo",
    "label_smoothing": "dpo",
    "simpo_gamma": "simpo",
    "desirable_weight": "kto",
    "undesirable_weight": "kto",
    "train_on": "sft",
}


@dataclass(frozen=True)
class TaskFigure:
    """A figure of lm-eval's: `stderr` None where there is none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None


@dataclass(frozen=True)
class KnownFacts:
    """What a model card says. None or empty: not known."""

    base: str | None  # a repository of the hub
    revision: str | None
    licence: str | None
    packing: Mapping[str, Any] | None  # config.json's `quantization`
    bits_per_weight: float | None
    report: Mapping[str, Any] | None  # report.json of convert
    scores: tuple[TaskFigure, ...]
    settings: Mapping[str, Any]  # of a training
    data: tuple[str, ...]  # the names of its files
    ggufs: Mapping[str, AboutGguf]  # by name; of a model in parts the first
    notes: tuple[str, ...]  # what is not known, and how to say it


def known_facts(contents: Contents, *, base: str | None, licence: str | None, results: Path | None) -> KnownFacts:
    """Raises CheckpointError for a file that is damaged."""
    directory, notes = contents.directory, []
    report = _optional(directory / "report.json")
    ggufs = _ggufs(contents)
    named, revision = (base, None) if base is not None else _base(contents, report, ggufs)
    repository, revision = _on_the_hub(named, revision)
    if repository is None:
        notes.append("the base model is not known by a name on the hub; give it with base=OWNER/REPO")
    if licence is None and repository is not None and repository.lower().startswith(_FAMILY):
        licence = "mit"
    if licence is None:
        notes.append("the licence is not known; give it with licence=NAME, such as mit")
    packing = None
    if contents.kind == "model":
        packing = read_json(directory / "config.json").get("quantization")
    run = _optional(directory / "run.json") if contents.kind == "adapter" else None
    settings = _settings(directory, run) if contents.kind == "adapter" else {}
    return KnownFacts(
        repository,
        revision,
        licence,
        packing if isinstance(packing, Mapping) else None,
        _bits(report),
        report,
        _scores(results if results is not None else directory / "results.json", wanted=results is not None),
        settings,
        _data(run),
        ggufs,
        tuple(notes),
    )


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _ggufs(contents: Contents) -> dict[str, AboutGguf]:
    """What its GGUF files say of themselves. CheckpointError for one that is damaged, or a part without the others."""
    names = [name for name in contents.files if name.endswith(".gguf")]
    for name in names:
        later = _LATER_PART.fullmatch(name)
        if later is not None and (first := f"{later[1]}-00001-of-{later[2]}.gguf") not in names:
            raise CheckpointError(f"{contents.directory} has {name} but not {first}; put all parts there")
    return {name: about_gguf(contents.files[name]) for name in names if not _LATER_PART.fullmatch(name)}


def _base(
    contents: Contents, report: Mapping[str, Any] | None, ggufs: Mapping[str, AboutGguf]
) -> tuple[str | None, str | None]:
    """(name, revision) of what it was made of, as its files have it."""
    if contents.kind == "gguf":
        base = _common(about.base for about in ggufs.values())
        revision = _common(about.revision for about in ggufs.values())
        return (base.removeprefix(_HUB), revision) if base is not None and base.startswith(_HUB) else (None, None)
    if contents.kind == "adapter":
        config = Fields(read_json(contents.directory / "adapter_config.json"), "adapter_config.json", CheckpointError)
        if "base_model_name_or_path" in config.raw:  # PEFT's
            return config.text("base_model_name_or_path"), config.raw.get("revision")
        base = config.raw.get("base_model")
        if isinstance(base, Mapping) and isinstance(base.get("name"), str):
            return base["name"], base.get("revision") if isinstance(base.get("revision"), str) else None
        return config.raw.get("model"), None
    source = (report or {}).get("source")
    revision = (report or {}).get("revision")
    return (source, revision if isinstance(revision, str) else None) if isinstance(source, str) else (None, None)


def _common(values: Iterable[str | None]) -> str | None:
    """What all are; None if they differ."""
    different = {*values}
    return different.pop() if len(different) == 1 else None


def _on_the_hub(name: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """(repository, revision) of a base's name, which may be a short one or the place of a download; None if no such."""
    if name is None:
        return None, None
    if os.path.isabs(name):
        return hub.snapshot_of(Path(name)) or (None, None)
    repository = hub.repository_of(name)
    return (repository, revision) if _REPOSITORY.fullmatch(repository) and not os.path.isdir(name) else (None, None)


def _bits(report: Mapping[str, Any] | None) -> float | None:
    bits = (report or {}).get("bits_per_weight")
    value = bits.get("result") if isinstance(bits, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _settings(directory: Path, run: Mapping[str, Any] | None) -> dict[str, Any]:
    config = read_json(directory / "adapter_config.json")
    known = {**_mapping(config.get("lora_parameters")), **_mapping(config.get("phi3_mlx"))}
    told = {key: known[key] for key in _SETTINGS if key in known}
    if "r" in config:  # PEFT's
        told |= {"rank": config["r"], "alpha": config.get("lora_alpha")}
    return {"kind": adapter_kind(directory, config), **told, **_in_effect(_mapping((run or {}).get("settings")))}


def _in_effect(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's settings those to show, without those that did nothing beside the others."""
    objective = settings.get("objective", "sft")
    idle = {name for name, owner in _OF_OBJECTIVE.items() if owner != objective}
    if settings.get("steps") is not None:
        idle.add("epochs")
    if settings.get("dpo_loss") == "ipo":
        idle.add("label_smoothing")
    return {name: settings[name] for name in _RUN_SETTINGS if name in settings and name not in idle}


def _data(run: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of data files, without their places on this disk."""
    given = _mapping((run or {}).get("settings")).get("data", ())
    sources = [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []
    return tuple(os.path.basename(os.path.normpath(str(source))) for source in sources)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _scores(path: Path, *, wanted: bool) -> tuple[TaskFigure, ...]:
    """The figures of results.json in lm-eval's layout."""
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        if wanted:
            raise CheckpointError(f"{path} is no results.json; name the file or the directory that eval has written")
        return ()
    results = read_json(path)
    shots = _mapping(results.get("n-shot"))
    scores = []
    for task, figures in _mapping(results.get("results")).items():
        for key, value in _mapping(figures).items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = figures.get(key.replace(metric, f"{metric}_stderr", 1))
            stderr = float(error) if isinstance(error, int | float) else None
            count = shots.get(task)
            scores.append(TaskFigure(task, metric, float(value), stderr, count if isinstance(count, int) else None))
    return tuple(scores)
