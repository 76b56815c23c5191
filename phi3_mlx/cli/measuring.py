"""Models that are asked tasks, one after another, and what is said of them: for `eval`, `convert` and `tune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.options import EvalOptions
from ..generation.request import Request
from .options import ModelOptions
from .progress import QuestionProgress
from .tables import print_table
from .terminal import note, show, show_json

EVALUATION = "evaluation"  # the folder for it, in what was made
_PLANNED = 2048  # tokens of a question, for the plan before anything is loaded

TASKS: dict[str, Any] = {  # the option
    "metavar": "NAME,FILE,...",
    "help": "When it is done, ask the models before and after these tasks, as `phi3-mlx eval --against`. "
    "Needs the extra eval.",
}


def task_names(given: str) -> list[str]:
    """The tasks of --tasks."""
    return [name.strip() for name in given.split(",") if name.strip()]


class Cost:
    """What a change costs on tasks. They are opened at once, so that a fault in them is known before the change."""

    def __init__(self, tasks: str):
        from ..evaluation.harness import check_tasks

        self._asked = {"tasks": task_names(tasks), "data": None, "include_path": None, **asdict(EvalOptions())}
        check_tasks(self._asked["tasks"])

    def of(self, before: ModelOptions | None, after: ModelOptions, folder: Path) -> str:
        """Ask both, say what differs, and write it into `folder`; the same as Markdown.

        `before` is None where it cannot be loaded.
        """
        from ..evaluation.journal import AGAINST
        from ..evaluation.report import summary_markdown

        results_before = None if before is None else evaluated(before, self._asked, folder / AGAINST)
        results = evaluated(after, self._asked, folder, against=results_before)
        tell(results, results_before)
        return summary_markdown(results, results_before)


def evaluated(
    source: ModelOptions, asked: Mapping[str, Any], folder: Path | None, against: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The results of a model, which is in memory for this call alone."""
    from ..evaluation.harness import evaluate

    place = source.find()
    tokenizer = source.load_tokenizer(place)
    request = Request(max_tokens=1, force=asked["force"])
    model = source.load_model(place, asked["max_length"] or _PLANNED, request)
    with QuestionProgress(f"evaluating {source.model}") as bar:
        return evaluate(
            model,
            tokenizer,
            output=folder,
            against=against,
            model_args=_model_args(source, place.directory),
            progress=bar.update,
            notify=note,
            **asked,
        )


def tell(results: Mapping[str, Any], before: Mapping[str, Any] | None, *, as_json: bool = False) -> None:
    """The tables, or one JSON object, on stdout; what was cut, on stderr."""
    from ..evaluation.figures import figures_of
    from ..evaluation.report import FIGURE_COLUMNS, PAIR_COLUMNS, cuts, figure_row, pair_row, verdicts

    pairs = results.get("against", ())
    if as_json:
        told = {key: value for key, value in results.items() if key not in ("samples", "configs")}
        show_json(told | ({"against": [asdict(pair) for pair in pairs]} if before is not None else {}))
    else:
        print_table([FIGURE_COLUMNS, *map(figure_row, figures_of(results))], right={3, 4, 5})
        if before is not None:
            show(f"\nagainst {before['config']['model']}:")
            print_table([PAIR_COLUMNS, *map(pair_row, pairs)], right={2, 3, 4, 6, 7, 8, 9})
            for line in verdicts(pairs):
                show(line)
    for line in cuts(results["phi3_mlx"]):
        note(line)
    if before is not None:
        for line in cuts(before["phi3_mlx"]):
            note(f"{before['config']['model']}: {line}")


def _model_args(source: ModelOptions, directory: Path) -> dict[str, Any]:
    """What else says which model it was: `revision` is the commit where the hub's cache tells it."""
    commit = directory.name if directory.parent.name == "snapshots" else None
    return {
        "pretrained": source.name(),
        "revision": commit or source.revision,
        "dtype": source.dtype,
        "longrope": source.longrope,
        "adapter": list(source.adapter),
    }
