"""Tasks whose questions are in a directory: lm-eval's definitions with these questions, and SVAMP, which it has not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .layouts import (
    ReadLine,
    Subjects,
    bbh_tasks,
    blimp_phenomena,
    hellaswag_question,
    svamp_question,
    winogrande_question,
)
from .questions import Question, arc_question, lines_of, mmlu_subjects, task_splits, worded_question

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

# Lines of JSON: the folder of lm-eval that defines the task, how its files are called, and what reads a line.
_TASKS_IN_LINES: dict[str, tuple[str, str, ReadLine]] = {
    "arc_easy": ("arc", "arc_easy", arc_question),
    "arc_challenge": ("arc", "arc_challenge", arc_question),
    "gsm8k": ("gsm8k", "gsm8k", worded_question),
    "gsm8k_cot": ("gsm8k", "gsm8k", worded_question),
    "winogrande": ("winogrande", "winogrande", winogrande_question),
    "hellaswag": ("hellaswag", "hellaswag", hellaswag_question),
}
_SPLIT_OF = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
# Tasks in parts, such as mmlu_anatomy: the folder, what reads the parts, and which split is asked.
_TASK_FAMILIES: dict[str, tuple[str, Callable[[Path], Subjects], dict[str, str]]] = {
    "mmlu": ("mmlu/default", mmlu_subjects, {"test": "test_split"}),
    "blimp": ("blimp", blimp_phenomena, {"train": "validation_split"}),
    "bbh_cot_fewshot": ("bbh/cot_fewshot", bbh_tasks, {"test": "test_split"}),
    "bbh_cot_zeroshot": ("bbh/cot_zeroshot", bbh_tasks, {"test": "test_split"}),
    "bbh_fewshot": ("bbh/fewshot", bbh_tasks, {"test": "test_split"}),
    "bbh_zeroshot": ("bbh/zeroshot", bbh_tasks, {"test": "test_split"}),
}
_SVAMP = "svamp"
NAMES_ON_DISK = (*_TASK_FAMILIES, *_TASKS_IN_LINES, _SVAMP)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_SAME_NUMBER = 1e-6


def tasks_on_disk(name: str, data: Path, num_fewshot: int | None) -> list[Task | Group]:
    """The task, or the group, of that name with the questions in `data`; none if no directory is read for it.

    Raises DataError for questions that are faulty, not there, or lack the examples that are to precede them.
    """
    if name == _SVAMP:
        return [_svamp(data)]
    if name in _TASKS_IN_LINES:
        folder, stem, read = _TASKS_IN_LINES[name]
        definition = _definition(_definitions(folder)[name])
        return [_with_data(definition, task_splits(data, stem, read), _SPLIT_OF, num_fewshot, data)]
    for family, (folder, read_parts, split_of) in _TASK_FAMILIES.items():
        if name == family or name.startswith(f"{family}_"):
            index = _definitions(folder)
            if name in index:
                return _of_family(name, family, index, read_parts(data), split_of, num_fewshot, data)
    return []


def _of_family(
    name: str,
    family: str,
    index: Mapping[str, Any],
    parts: Subjects,
    split_of: Mapping[str, str],
    num_fewshot: int | None,
    data: Path,
) -> list[Task | Group]:
    tasks = {}
    for part, splits in parts.items():
        entry = index.get(f"{family}_{part}")
        if entry is None:
            raise DataError(f"{data} has a subject {part!r}, which {family} does not have; take its file away")
        tasks[entry.name] = _with_data(_definition(entry), splits, split_of, num_fewshot, data)
    made = _inside(name, index, tasks)
    if not made:
        raise DataError(f"{data} has no questions of {name}; it has those of {', '.join(sorted(parts))}")
    return made


def _inside(name: str, index: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[Task | Group]:
    """What lm-eval knows by a name, of the tasks that there are: one, all with a tag, or a group of them."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    if name in tasks:
        return [tasks[name]]
    entry = index[name]
    if not entry.cfg:
        return [each for member in sorted(entry.tags) for each in _inside(member, index, tasks)]
    if "group" not in entry.cfg:
        return []
    group = Group.from_config(GroupConfig(**entry.cfg))
    for each in (each for member in entry.cfg["task"] for each in _inside(member, index, tasks)):
        group.add(each)
    return [group] if len(group) else []


def _definitions(folder: str) -> Mapping[str, Any]:
    """lm-eval's definitions in a folder of its tasks: all of them take ten seconds to read."""
    import lm_eval.tasks

    where = Path(lm_eval.tasks.__file__).parent / folder
    index: Mapping[str, Any] = lm_eval.tasks.TaskManager(include_path=str(where), include_defaults=False).task_index
    return index


def _definition(entry: Any) -> dict[str, Any]:
    """A task's definition with the functions that it names, which the index has not loaded."""
    from lm_eval.tasks._yaml_loader import load_yaml

    definition: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=True)
    return definition


def _with_data(
    definition: Mapping[str, Any],
    splits: Mapping[str, list[Question]],
    split_of: Mapping[str, str],
    num_fewshot: int | None,
    data: Path,
) -> Task:
    """A task as lm-eval defines it, with these questions."""
    config = {key: value for key, value in definition.items() if key not in ("tag", "group", "task_list")}
    for split, key in split_of.items():
        config[key] = split if split in splits else None
    default = config.get("num_fewshot")
    shots = default or 0 if num_fewshot is None or default == 0 else num_fewshot  # a task that says 0 keeps it
    known = {"train"} if config.get("fewshot_split") is None else {config["fewshot_split"]}
    examples = (config.get("fewshot_config") or {}).get("samples")  # examples that the definition holds
    if not known & {*splits} and examples is None:
        if shots:
            raise DataError(
                f"{config['task']} begins with {shots} examples, and {data} has no split {min(known)!r} of it to take "
                "them from; give num_fewshot=0"
            )
        config["fewshot_split"] = None
    return task_with(config, splits)


def _svamp(data: Path) -> Task:
    """SVAMP's sums in words, asked as GSM8K's; the last number of an answer counts."""
    path = data / "svamp.jsonl"  # as it is published: one file, no splits
    if path.exists():
        splits = {"test": [svamp_question(line, source) for line, source in lines_of(path)]}
    else:
        splits = task_splits(data, _SVAMP, svamp_question)
    if not splits.get("test"):
        raise DataError(f"{data} has no questions of {_SVAMP}; looked for svamp.jsonl and svamp/test.jsonl")
    return task_with(
        {
            "task": _SVAMP,
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "Question: {{ question }}\nAnswer:",
            "doc_to_target": "answer",
            "generation_kwargs": {
                "until": ["Question:", "</s>", "<|im_end|>"],
                "max_gen_toks": 256,
                "do_sample": False,
            },
            "process_results": _last_number_is_right,
            "metric_list": [mean_of("exact_match")],
            "metadata": {"version": 1},
        },
        splits,
    )


def _last_number_is_right(question: Question, answers: Sequence[str]) -> dict[str, float]:
    *_, last = [None, *_numbers(answers[0])]
    return {"exact_match": float(last is not None and abs(last - float(question["answer"])) < _SAME_NUMBER)}


def _numbers(text: str) -> Iterator[float]:
    return (float(match[0].replace(",", "")) for match in _NUMBER.finditer(text))


def mean_of(metric: str) -> dict[str, Any]:
    """How lm-eval is told that a metric is averaged."""
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def task_with(config: Mapping[str, Any], splits: Mapping[str, list[Question]], kind: type[Any] | None = None) -> Task:
    """lm-eval's task of a definition, with these questions; `kind`: a class that derives from `ConfigurableTask`."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    tables = {split: datasets.Dataset.from_list(questions) for split, questions in splits.items()}
    return (kind or ConfigurableTask)(config={**config, "custom_dataset": lambda **_: tables})
