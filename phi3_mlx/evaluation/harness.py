"""A model asked the tasks of lm-eval: from their names to a table, and the files that lm-eval writes."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.identity import model_fingerprint
from ..errors import OptionError
from ..models.decoder import Model
from ..option import arguments
from ..paths import expanded
from ..values import check_function, optional, refusal, shown, texts
from ..values import path as as_path
from .harness_request import harness_request
from .journal import check_output, opened
from .options import EvalOptions
from .paired import compare_results, document_error
from .quiet import quiet
from .report import write_results
from .tasks import check_chat, harness_tasks, tasks_in
from .three_ways import NOTES, THREE_WAYS

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .lm import HarnessLM

_NO_TASKS = "tasks is empty; name some, such as mmlu, or a .jsonl file of questions"
_SEEDS = (0, 1234)  # of Python and of numpy
_RESAMPLES = 1000  # for the error of a figure that has no formula for it
# What must be the same for both of two models. Not their answers' length, nor what a run may do.
_ASKED_ALIKE = ("limit", "num_fewshot", "chat", "fewshot_as_multiturn", "system", "gen_kwargs", "seed")


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: str | Sequence[str],
    *,
    data: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    against: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    limit: int | None = EvalOptions.limit,
    num_fewshot: int | None = EvalOptions.num_fewshot,
    chat: bool = EvalOptions.chat,
    fewshot_as_multiturn: bool = EvalOptions.fewshot_as_multiturn,
    system: str | None = EvalOptions.system,
    gen_kwargs: Mapping[str, Any] | str | None = EvalOptions.gen_kwargs,
    max_length: int | None = EvalOptions.max_length,
    seed: int = EvalOptions.seed,
    allow_code: bool = EvalOptions.allow_code,
    force: bool = EvalOptions.force,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """How well a model answers the tasks of lm-eval (extra `eval`): what `lm_eval.evaluate` returns.

        before = evaluate(*load("phi-3.5-mini"), ["mmlu", "my_questions.jsonl"], data="eval", limit=100)
        results = evaluate(*load("mini-4bit"), ["mmlu", "my_questions.jsonl"], data="eval", limit=100, against=before)
        results["results"]["my_questions"]["acc,none"]

    `tasks`: names of lm-eval's tasks and groups, `.jsonl` files of your own questions, a line {"question", "choices",
    "answer"} or {"question", "answer"} each, and texts whose perplexity is measured: `.txt` files, or `.jsonl` with a
    line {"text"} each. `data`: a directory that has the questions of MMLU, ARC, GSM8K, WinoGrande, HellaSwag,
    BLiMP, BBH or SVAMP (docs/evaluation.md has the files); those of other tasks come from the hub. `include_path`: a
    directory of YAML files that define more tasks. `mmlu_three_ways` is MMLU as the report lays it out, as lm-eval
    does, and in the chat.

    Prompts are lm-eval's own. With `chat` they are put into the model's template, `system` as its system message, and
    with `fewshot_as_multiturn` the examples are turns of their own. `gen_kwargs` change how answers are generated.
    `results["phi3_mlx"]` counts what was cut: `cut_prompts` lost their beginning, since they were longer than
    `max_length`, and `cut_answers` reached their longest. `progress(done, total)` counts what was read or answered; a
    `ProgressBar` shows it. `notify` gets sentences for the user.

    `output`: a directory that gets each answer as it comes, and in the end results.json, samples.jsonl and report.md. A
    run that was interrupted goes on there if all that matters is as it was, and is refused if not. `against`: what
    this function returned of a model to compare with, asked the same; then `results["against"]` has for each metric
    the difference, its interval, McNemar's test and the questions that flipped. `model_args`: what the results are to
    say of the model, such as {"pretrained": its name, "revision": ...}.

    Raises OptionError for an unknown task, for one that runs code, unless `allow_code`, and for an `against` that was
    asked otherwise; DataError for questions that are not there or faulty, and for an output that cannot be written or
    holds something else; and what `generate` raises.
    """
    options = EvalOptions(**arguments(EvalOptions, locals()))
    names = texts([tasks] if isinstance(tasks, str) else tasks, "tasks")
    if not names:
        raise OptionError(_NO_TASKS)
    if THREE_WAYS in names and (options.chat or options.fewshot_as_multiturn):
        raise OptionError(f"{THREE_WAYS} asks in a chat and without one; leave chat and fewshot_as_multiturn out")
    data_path, include, folder = (
        None if (given := optional(as_path, value, name)) is None else expanded(given)
        for value, name in ((data, "data"), (include_path, "include_path"), (output, "output"))
    )
    check_function(progress, "progress")
    check_function(notify, "notify")
    _check_against(against, options)
    if options.generation:
        harness_request(options.generation, max_tokens=1)  # refuses what has no meaning
    if folder is not None:
        check_output(folder)
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
    started = time.time()
    with _as_lm_eval_runs(), ExitStack() as stack:
        made = harness_tasks(
            names,
            data=data_path,
            include_path=include,
            num_fewshot=options.num_fewshot,
            allow_code=options.allow_code,
            count_tokens=lm.count_tokens,
            apply_chat_template=lm.apply_chat_template,
        )
        _check_same_tasks(against, made)
        notes = [NOTES[name] for name in (getattr(each, "name", None) for each in made) if name in NOTES]
        if notify is not None:
            for note in notes:
                notify(note)
        if folder is not None:
            lm.journal = stack.enter_context(opened(folder, _identity(model, names, options)))
            if lm.journal.earlier and notify is not None:
                notify(f"{folder} has answers of an earlier run, which goes on from there")
        results = _asked(lm, made, options)
        said = {} if model_args is None else dict(model_args)
        results["config"] = {"model": said.get("pretrained", "phi3_mlx"), "model_args": said, **asdict(options)}
        results |= {"date": started, "lm_eval_version": version("lm_eval"), "phi3_mlx_version": version("phi3-mlx")}
        results["phi3_mlx"] = {
            "cut_prompts": lm.cut_prompts,
            "cut_answers": lm.cut_answers,
            "seconds": round(time.time() - started, 1),
            "prompt_hashes": {task: _prompts_hash(samples) for task, samples in results["samples"].items()},
            "notes": notes,
        }
        if against is not None:
            results["against"] = compare_results(against, results)
        if folder is not None:
            write_results(results, folder, before=against)
    return results


def _check_against(against: Mapping[str, Any] | None, options: EvalOptions) -> None:
    """OptionError where the other model was asked in another way: hours later their answers could not be compared."""
    if against is None:
        return
    if not isinstance(against, Mapping) or "samples" not in against:
        raise refusal(against, "against", "what evaluate returned of another model")
    asked, given = against.get("config", {}), asdict(options)
    for name in _ASKED_ALIKE:
        if name in asked and asked[name] != given[name]:
            raise OptionError(
                f"against was asked with {name}={shown(asked[name])}, and this model would be with "
                f"{name}={shown(given[name])}; ask both the same"
            )


def _check_same_tasks(against: Mapping[str, Any] | None, made: Sequence[Any]) -> None:
    """OptionError where the other model was not asked one of these tasks."""
    if against is None:
        return
    names = [task.task_name for task in tasks_in(made)]
    if lacking := [name for name in names if name not in against["samples"]]:
        raise OptionError(f"against has no answers to {lacking[0]}; ask both models the same tasks")


def check_tasks(names: Sequence[str]) -> None:
    """What `evaluate` raises for tasks that cannot be asked; where they are to be asked later."""
    if not names:
        raise OptionError(_NO_TASKS)
    from . import lm  # noqa: F401 - says where lm-eval is not installed

    with _as_lm_eval_runs():
        harness_tasks(names)


def _identity(model: Model, names: Sequence[str], options: EvalOptions) -> dict[str, Any]:
    """What must be the same where an evaluation goes on; the questions themselves are looked at as they are asked."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("force", "allow_code")}
    return {"model": model_fingerprint(model), "tasks": [*names], "lm_eval": version("lm_eval"), **settings}


def _asked(lm: HarnessLM, made: Sequence[Any], options: EvalOptions) -> dict[str, Any]:
    """lm-eval's results."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([*made])
    if options.chat or options.fewshot_as_multiturn:
        check_chat([*loaded["tasks"].values()])
    for task in loaded["tasks"].values():
        _set_shots(task, options)
        if options.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=options.generation, update=True)
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
    _add_document_errors(results)
    return results


def _prompts_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """What two runs of a task have in common if, and only if, they asked the same texts in the same order."""
    return sha256("".join(sample["prompt_hash"] for sample in samples).encode()).hexdigest()


def _add_document_errors(results: Mapping[str, Any]) -> None:
    """The standard error of figures of documents, for which lm-eval has none: over draws of documents."""
    for task, samples in results["samples"].items():
        for metric in samples[0]["metrics"] if len(samples) > 1 else ():
            rows = [sample[metric] for sample in samples]
            if all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
                key = f"{metric}_stderr,{samples[0]['filter']}"
                results["results"][task][key] = document_error(np.array(rows, dtype=float), metric)


def _set_shots(task: Any, options: EvalOptions) -> None:
    """How many examples precede the task's questions; a task that says 0 keeps it, as in lm-eval."""
    shots = task.get_config("num_fewshot")
    if options.num_fewshot is not None and shots != 0:
        shots = options.num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=options.seed)


@contextlib.contextmanager
def _as_lm_eval_runs() -> Iterator[None]:
    """With the seeds of lm-eval, for tasks that draw, and without its log and the hub's, which tells of each try.

    And without its processes, which would be forks of one that has MLX, and without the bars of datasets, of its tasks
    and of its draws, one each, beside which `progress` would not be seen. Its draws also print, where a JSON object
    may be all that is to stand.
    """
    import random

    import datasets
    from lm_eval.api import metrics, task

    key = "DISABLE_MULTIPROC"
    before = os.environ.get(key)
    states = random.getstate(), np.random.get_state()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    own_bar, task.tqdm = task.tqdm, partial(task.tqdm, disable=True)
    own_draws, metrics.bootstrap_stderr = metrics.bootstrap_stderr, partial(_unheard, metrics.bootstrap_stderr)
    os.environ[key] = "1"
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    try:
        with quiet("lm_eval", "huggingface_hub"):
            yield
    finally:
        task.tqdm, metrics.bootstrap_stderr = own_bar, own_draws
        if bars:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _unheard(work: Callable[..., float], *given: Any, **more: Any) -> float:
    """The result of some work of lm-eval's, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work(*given, **more)
