"""phi3-mlx eval"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError
from ..evaluation.options import EvalOptions
from ..generation.request import Request
from .declare import options_of
from .options import ModelOptions, model_options, within_memory
from .progress import ReadingProgress
from .tables import print_table
from .terminal import note, show_json

if TYPE_CHECKING:
    from ..evaluation.harness import Figure

_PLANNED = 2048  # tokens of a question, for the plan before anything is loaded


@click.command()
@model_options
@click.option(
    "--tasks", required=True, metavar="NAME,FILE,...", help="lm-eval's tasks, and .jsonl files of your questions."
)
@click.option("--data", metavar="DIR", help="Take the questions of mmlu, arc_easy, arc_challenge, gsm8k from here.")
@click.option("-o", "--output", metavar="DIR", help="Write results.json and samples.jsonl into this new directory.")
@options_of("options", EvalOptions, before={"force": [within_memory]})
@click.option("--json", "as_json", is_flag=True, help="One JSON object: lm-eval's results, without the samples.")
def eval(
    source: ModelOptions, tasks: str, data: str | None, output: str | None, options: EvalOptions, as_json: bool
) -> None:
    """Ask a model the tasks of lm-eval, or your own questions, and say how many it got right.

    Needs the extra eval. Prompts, examples and metrics are those of lm-eval. Without --data it downloads the questions.
    A line of your own file is {"question": ..., "choices": [...], "answer": ...}, or the same without choices.

    \b
    phi3-mlx eval --tasks questions.jsonl --chat
    phi3-mlx eval -m phi-3.5-mini-4bit --tasks gsm8k --limit 100 --chat
    phi3-mlx eval -m phi-3.5-mini-4bit --tasks mmlu --data mmlu -o mmlu-4bit
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports it: lm-eval draws bars of its own
    if output is not None and os.path.lexists(output):
        raise DataError(f"{output} exists already; name another directory")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    from ..evaluation.harness import evaluate, figures_of, write_results
    from ..store.atomic import new_directory

    place = source.find()
    tokenizer = source.load_tokenizer(place)
    model = source.load_model(place, options.max_length or _PLANNED, Request(max_tokens=1, force=options.force))
    with ExitStack() as stack:
        folder = stack.enter_context(new_directory(Path(output), fault=DataError)) if output is not None else None
        bar = stack.enter_context(ReadingProgress("questions", label="evaluating"))
        results = evaluate(model, tokenizer, names, data=data, **asdict(options), progress=bar.update, notify=note)
        results["config"] |= {"model": source.name(), "model_args": _model_args(source, place.directory)}
        if folder is not None:
            write_results(results, folder)
    if as_json:
        show_json({key: value for key, value in results.items() if key not in ("samples", "configs")})
    else:
        print_table([_COLUMNS, *map(_row, figures_of(results))], right={3, 4, 5})
    for line in _cuts(results["phi3_mlx"]):
        note(line)


_COLUMNS = ("task", "metric", "answer by", "shots", "questions", "value", "95 %")


def _row(figure: Figure) -> tuple[str, ...]:
    shots = "" if figure.shots is None else str(figure.shots)
    interval = "" if figure.interval is None else f"± {figure.interval:.4f}"
    answer = "" if figure.filtered == "none" else figure.filtered
    return figure.task, figure.metric, answer, shots, f"{figure.questions:,}", f"{figure.value:.4f}", interval


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


def _cuts(counts: dict[str, Any]) -> list[str]:
    """What was cut, in sentences."""
    said = {
        "cut_prompts": "prompts were longer than --max-length and lost their beginning",
        "cut_answers": "answers were cut by their budget (max_gen_toks)",
    }
    return [f"{counts[key]:,} {sentence}" for key, sentence in said.items() if counts[key]]
