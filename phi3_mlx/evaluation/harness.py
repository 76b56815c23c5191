"""A model asked the tasks of lm-eval: from their names to a table, and the files that lm-eval writes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OptionError
from ..models.decoder import Model
from ..option import arguments
from ..values import optional, texts
from ..values import path as as_path
from .options import EvalOptions
from .tasks import harness_tasks

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_SEEDS = (0, 1234)  # of Python and of numpy
_RESAMPLES = 1000  # for the error of a figure that has no formula for it


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: str | Sequence[str],
    *,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = EvalOptions.limit,
    num_fewshot: int | None = EvalOptions.num_fewshot,
    chat: bool = EvalOptions.chat,
    fewshot_as_multiturn: bool = EvalOptions.fewshot_as_multiturn,
    system: str | None = EvalOptions.system,
    max_length: int | None = EvalOptions.max_length,
    seed: int = EvalOptions.seed,
    allow_code: bool = EvalOptions.allow_code,
    force: bool = EvalOptions.force,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """How well a model answers the tasks of lm-eval (extra `eval`): what `lm_eval.evaluate` returns.

        results = evaluate(*load("phi-3.5-mini-4bit"), ["mmlu", "my_questions.jsonl"], data="eval", limit=100)
        results["results"]["my_questions"]["acc,none"]

    `tasks`: names of lm-eval's tasks and groups, and `.jsonl` files of your own questions, a line {"question",
    "choices", "answer"} or {"question", "answer"} each. `data`: a directory that has the questions of MMLU (its own
    CSV files), ARC or GSM8K (JSON lines); those of other tasks come from the hub.

    Prompts are lm-eval's own. With `chat` they are put into the model's template, `system` as its system message, and
    with `fewshot_as_multiturn` the examples are turns of their own. `results["phi3_mlx"]` counts what was cut:
    `cut_prompts` lost their beginning, since they were longer than `max_length`, and `cut_answers` reached their
    longest. `progress(done, total)` counts what was read or answered, `notify` gets sentences for the user.

    Raises OptionError for an unknown task and for one that runs code, unless `allow_code`; DataError for questions that
    are not there or faulty; and what `generate` raises.
    """
    options = EvalOptions(**arguments(EvalOptions, locals()))
    names = texts([tasks] if isinstance(tasks, str) else tasks, "tasks")
    if not names:
        raise OptionError("tasks is empty; name some, such as mmlu, or a .jsonl file of questions")
    directory = optional(as_path, data, "data")
    from .lm import HarnessLM  # first: it says where lm-eval is not installed

    lm = HarnessLM(
        model,
        tokenizer,
        max_length=options.max_length,
        seed=options.seed,
        force=options.force,
        progress=progress,
        notify=notify,
    )
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    started = time.time()
    with _as_lm_eval_runs():
        loaded = TaskManager(include_defaults=False).load(
            harness_tasks(
                names,
                data=None if directory is None else Path(directory).expanduser(),
                num_fewshot=options.num_fewshot,
                allow_code=options.allow_code,
            )
        )
        for task in loaded["tasks"].values():
            _set_shots(task, options)
        results: dict[str, Any] = evaluator.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=options.limit,
            system_instruction=options.system,
            apply_chat_template=options.chat or options.fewshot_as_multiturn,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            confirm_run_unsafe_code=options.allow_code,
            bootstrap_iters=_RESAMPLES,
        )
    results["config"] = {"model": "phi3_mlx", **asdict(options)}
    results |= {"date": started, "lm_eval_version": version("lm_eval"), "phi3_mlx_version": version("phi3-mlx")}
    results["phi3_mlx"] = {
        "cut_prompts": lm.cut_prompts,
        "cut_answers": lm.cut_answers,
        "seconds": round(time.time() - started, 1),
    }
    return results


def _set_shots(task: Any, options: EvalOptions) -> None:
    """How many examples precede the task's questions; a task that says 0 keeps it, as in lm-eval."""
    shots = task.get_config("num_fewshot")
    if options.num_fewshot is not None and shots != 0:
        shots = options.num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=options.seed)


class Figure(NamedTuple):
    """A metric of a task or a group. `filtered`: how answers are taken from texts; `error`: standard, if known."""

    task: str
    metric: str
    filtered: str
    shots: int | None
    questions: int
    value: float
    error: float | None

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval."""
        return None if self.error is None else 1.96 * self.error


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    """The metrics in what `evaluate` returned: groups first, then tasks, in lm-eval's order."""
    groups = results.get("groups") or {}
    order = [*reversed([*groups]), *(name for name in results["results"] if name not in groups)]
    figures = []
    for name in order:
        told = groups[name] if name in groups else results["results"][name]
        for key, value in told.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = told.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            figures.append(
                Figure(
                    name,
                    metric,
                    filtered,
                    results["n-shot"].get(name),
                    int(told["sample_len"]),
                    float(value),
                    float(error) if known else None,
                )
            )
    return figures


def write_results(results: Mapping[str, Any], directory: Path) -> None:
    """`results.json`, as lm-eval lays it out, and `samples.jsonl`: a line for each question and way to read its answer.

    A line has lm-eval's keys (doc, arguments, resps, prompt_hash, the metrics) and its `task`.
    """
    from lm_eval.utils import handle_non_serializable

    def write(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=handle_non_serializable)

    told = {key: value for key, value in results.items() if key != "samples"}
    (directory / "results.json").write_text(write(told, indent=2) + "\n", encoding="utf-8")
    with open(directory / "samples.jsonl", "w", encoding="utf-8") as file:
        for task, samples in results["samples"].items():
            file.writelines(write({"task": task, **sample}) + "\n" for sample in samples)


@contextlib.contextmanager
def _as_lm_eval_runs() -> Iterator[None]:
    """With the seeds of lm-eval, for tasks that draw, and without its log.

    And without its processes, which would be forks of one that has MLX.
    """
    import random

    import numpy as np

    log, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = log.level, os.environ.get(key)
    states = random.getstate(), np.random.get_state()
    log.setLevel(logging.ERROR)
    os.environ[key] = "1"
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    try:
        yield
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before
