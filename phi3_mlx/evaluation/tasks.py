"""Tasks of lm-eval: its own by name, its own with questions that are on disk, and a user's file of questions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from .questions import Question, arc_question, mmlu_subjects, own_questions, task_splits, worded_question

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

# Tasks whose questions `data` may hold: the folder of lm-eval that defines them, how their files are called, and what
# reads a line. MMLU's files are CSV.
_ON_DISK: dict[str, tuple[str, str, Callable[[Question, str], Question]]] = {
    "arc_easy": ("arc", "arc_easy", arc_question),
    "arc_challenge": ("arc", "arc_challenge", arc_question),
    "gsm8k": ("gsm8k", "gsm8k", worded_question),
    "gsm8k_cot": ("gsm8k", "gsm8k", worded_question),
}
_MMLU = "mmlu"
_SPLIT_OF = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
_LONGEST_ANSWER = 64  # tokens to a user's question without choices


def harness_tasks(
    names: Sequence[str], *, data: Path | None = None, num_fewshot: int | None = None, allow_code: bool = False
) -> list[Task | Group]:
    """The tasks that lm-eval is to ask: names of its own tasks or groups, or `.jsonl` files of questions.

    `data`: a directory that has the questions of MMLU, ARC or GSM8K; those of other tasks come from the hub.
    Raises OptionError for a name that is neither, and for a task that runs code which the model writes unless
    `allow_code`; DataError for questions that are faulty, not there, or lack the examples that are to precede them.
    """
    made: list[Task | Group] = []
    named = []
    for name in names:
        if name.endswith((".jsonl", ".json")):
            made.append(_own_task(Path(name).expanduser(), num_fewshot or 0))
        elif data is not None and name == _MMLU:
            made.append(_mmlu(data, num_fewshot))
        elif data is not None and name in _ON_DISK:
            made.append(_task_on_disk(name, data, num_fewshot))
        else:
            named.append(name)
    return made + (_by_name(named, data, allow_code) if named else [])


# On disk.


def _mmlu(data: Path, num_fewshot: int | None) -> Task | Group:
    subjects = mmlu_subjects(data)
    index = _definitions("mmlu/default")
    tasks = {}
    for subject, splits in subjects.items():
        entry = index.get(f"mmlu_{subject}")
        if entry is None:
            raise DataError(f"{data} has a subject {subject!r}, which MMLU does not have; take its file away")
        tasks[entry.name] = _with_data(entry.cfg, splits, {"test": "test_split"}, num_fewshot, data)
    (group,) = _inside(_MMLU, index, tasks)
    return group


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


def _task_on_disk(name: str, data: Path, num_fewshot: int | None) -> Task:
    folder, stem, read = _ON_DISK[name]
    splits = task_splits(data, stem, read)
    return _with_data(_definitions(folder)[name].cfg, splits, _SPLIT_OF, num_fewshot, data)


def _definitions(folder: str) -> Mapping[str, Any]:
    """lm-eval's definitions in a folder of its tasks: all of them take ten seconds to read."""
    import lm_eval.tasks

    where = Path(lm_eval.tasks.__file__).parent / folder
    index: Mapping[str, Any] = lm_eval.tasks.TaskManager(include_path=str(where), include_defaults=False).task_index
    return index


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
    shots = config.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    known = {"train"} if config.get("fewshot_split") is None else {config["fewshot_split"]}
    if not known & {*splits}:
        if shots:
            raise DataError(
                f"{config['task']} begins with {shots} examples, and {data} has no split {min(known)!r} of it to take "
                "them from; give num_fewshot=0"
            )
        config["fewshot_split"] = None
    return _made(config, splits)


def _own_task(path: Path, num_fewshot: int) -> Task:
    """A user's questions: with choices the letter of the right one is scored, else the answer is generated."""
    questions = own_questions(path)
    if num_fewshot >= len(questions):
        raise DataError(f"{path} has {len(questions)} questions; num_fewshot must be less, and is {num_fewshot}")
    config: dict[str, Any] = {
        "task": path.stem,
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1},
    }
    if "letters" in questions[0]:
        listed = "{% for choice in choices %}{{ letters[loop.index0] }}. {{ choice }}\n{% endfor %}"
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{ question.strip() }}\n" + listed + "Answer:",
            "doc_to_choice": "letters",
            "doc_to_target": "answer",
            "metric_list": [_mean("acc")],
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{ question.strip() }}\nAnswer:",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": _LONGEST_ANSWER, "do_sample": False},
            "process_results": _right,
            "metric_list": [_mean("exact_match"), _mean("contains")],
        }
    return _made(config, {"test": questions})


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _right(question: Question, answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the right one, and whether it has it among other words; neither case nor marks count."""
    said, expected = (" ".join(_words(text)) for text in (answers[0], question["answer"]))
    return {"exact_match": float(said == expected), "contains": float(f" {expected} " in f" {said} ")}


def _words(text: str) -> Iterator[str]:
    import re

    return (match[0] for match in re.finditer(r"\w+", text.casefold()))


def _made(config: Mapping[str, Any], splits: Mapping[str, list[Question]]) -> Task:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    tables = {split: datasets.Dataset.from_list(questions) for split, questions in splits.items()}
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: tables})


# By name.


def _by_name(names: Sequence[str], data: Path | None, allow_code: bool) -> list[Task | Group]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index, *_ON_DISK], n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those that there are"
            raise OptionError(f"task {name!r} is unknown: {hint} A file of questions ends in .jsonl")
        if not allow_code and (unsafe := next(_running_code(name, manager.task_index), None)):
            raise OptionError(f"task {unsafe} runs code that the model writes on this machine; allow_code=True lets it")
    made: list[Task | Group] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, its file systems, the hub or the network, whichever comes first
            where = "" if data is None else f" {data} may hold those of {', '.join([_MMLU, *_ON_DISK])} alone."
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the questions of {name} are not there ({type(error).__name__}: {reason}).{where}"
            ) from error
        inside = {task for group in loaded.get("groups", {}).values() for task in group.get_all_tasks()}
        tops = [group for group in loaded.get("groups", {}).values() if group.name == name]
        made += tops or [task for task in loaded["tasks"].values() if task not in inside]
    return made


def _running_code(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks of that name that run what the model writes."""
    entry = index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if config.get("unsafe_code"):
        yield name
    members = entry.tags if not config else config["task"] if "group" in config else []
    for member in members if isinstance(members, list | set | tuple) else ():
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(inner, str) and inner != name:
            yield from _running_code(inner, index)
