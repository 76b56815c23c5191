"""Tasks of lm-eval: its own by name, and a user's file of questions. `disk.py` makes those whose data is on disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from ..paths import expanded
from .disk import NAMES_ON_DISK, mean_of, task_with, tasks_on_disk
from .passages import TEXT_ENDINGS, passages_config, read_passages
from .questions import Question, own_questions
from .three_ways import THREE_WAYS, mmlu_three_ways

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_LONGEST_ANSWER = 64  # tokens to a user's question without choices


def harness_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    allow_code: bool = False,
    count_tokens: Callable[[str], int] = len,
    apply_chat_template: Callable[..., str] | None = None,
) -> list[Task | Group]:
    """The tasks that lm-eval is to ask: names of its own tasks or groups, or files of questions or texts.

    `data`: a directory that has the questions of the tasks of `NAMES_ON_DISK`; those of others come from the hub.
    `include_path`: a directory with the definitions of more tasks, lm-eval's YAML. `count_tokens`: how many tokens of a
    text a model predicts. `apply_chat_template(messages)`: for `mmlu_three_ways`, which asks in a chat too.
    Raises OptionError for a name that is neither, and for a task that runs code which the model writes unless
    `allow_code`; DataError for questions that are faulty, not there, or lack the examples that are to precede them.
    What is named twice, by itself and in a group or in two groups one of which is in the other, is asked once.
    """
    made: list[tuple[Task | Group, str]] = []  # each with what its questions come from
    named = []
    for name in names:
        if name.endswith((".jsonl", ".json", *TEXT_ENDINGS)):
            path = expanded(name)
            made.append((_own_task(path, num_fewshot or 0, count_tokens), os.path.realpath(path)))
        elif name == THREE_WAYS:
            made += [(each, THREE_WAYS) for each in mmlu_three_ways(data, num_fewshot, apply_chat_template)]
        elif data is not None and (on_disk := tasks_on_disk(name, data, num_fewshot)):
            made += [(each, "data") for each in on_disk]
        else:
            named.append(name)
    made += [(each, "lm-eval") for each in _by_name(named, data, include_path, allow_code)] if named else []
    return _each_once(made)


def _each_once(made: Sequence[tuple[Task | Group, str]]) -> list[Task | Group]:
    """The tasks and groups that are in no other one: of mmlu_anatomy and mmlu_stem the group, which has both.

    OptionError where two tasks of one name are left, since lm-eval knows tasks by name (a file's is that of its stem).
    """
    kept: list[tuple[Task | Group, str]] = []
    for item, source in made:
        if any(source == other and _own_name(item) in _names_in(each) for each, other in kept):
            continue
        kept = [(each, other) for each, other in kept if source != other or _own_name(each) not in _names_in(item)]
        kept.append((item, source))
    owners: dict[str, str] = {}
    for item, _ in kept:
        for name in (task.task_name for task in _tasks_in(item)):
            if name in owners:
                first, second = owners[name], _own_name(item)
                where = "with other questions" if first == second else f"in {first} and in {second}"
                raise OptionError(f"tasks has {name} twice, {where}; ask one at a time")
            owners[name] = _own_name(item)
    return [item for item, _ in kept]


def _own_name(item: Task | Group) -> str:
    return item.name if hasattr(item, "get_all_tasks") else item.task_name


def _tasks_in(item: Task | Group) -> list[Task]:
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def tasks_in(items: Sequence[Task | Group]) -> list[Task]:
    """The tasks of some tasks and groups."""
    return [task for item in items for task in _tasks_in(item)]


def _names_in(item: Task | Group) -> set[str]:
    """Its own name, and those of the tasks and groups in it."""
    groups = item.get_all_groups() if hasattr(item, "get_all_tasks") else []
    return {_own_name(item), *(task.task_name for task in _tasks_in(item)), *(group.name for group in groups)}


# A user's file.


def _own_task(path: Path, num_fewshot: int, count_tokens: Callable[[str], int]) -> Task:
    """A user's texts or questions: with choices the letter of the right one is scored, else the answer is generated."""
    if (texts := read_passages(path)) is not None:
        definition, passages = passages_config(texts, count_tokens)
        return task_with({"task": path.stem, **definition}, {"test": passages})
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
            "metric_list": [mean_of("acc")],
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{ question.strip() }}\nAnswer:",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": _LONGEST_ANSWER, "do_sample": False},
            "process_results": _right,
            "metric_list": [mean_of("exact_match"), mean_of("contains")],
        }
    return task_with(config, {"test": questions})


def _right(question: Question, answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the right one, and whether it has it among other words; neither case nor marks count."""
    said, expected = (" ".join(_words(text)) for text in (answers[0], question["answer"]))
    return {"exact_match": float(said == expected), "contains": float(f" {expected} " in f" {said} ")}


def _words(text: str) -> Iterator[str]:
    import re

    return (match[0] for match in re.finditer(r"\w+", text.casefold()))


# By name.


def _by_name(
    names: Sequence[str], data: Path | None, include_path: Path | None, allow_code: bool
) -> list[Task | Group]:
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index, *NAMES_ON_DISK, THREE_WAYS], n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those that there are."
            where = "" if include_path is None else f" No YAML file in {include_path} defines it, or it is faulty."
            raise OptionError(f"task {name!r} is unknown: {hint}{where} A file of questions ends in .jsonl")
        if not allow_code and (unsafe := next(_running_code(name, manager.task_index), None)):
            raise OptionError(f"task {unsafe} runs code that the model writes on this machine; allow_code=True lets it")
    made: list[Task | Group] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, its file systems, the hub or the network, whichever comes first
            known = ", ".join(NAMES_ON_DISK)
            where = f"{data} may hold those of {known} alone" if data else f"data=DIR takes those of {known} from there"
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the questions of {name} are not there ({type(error).__name__}: {reason}); {where}"
            ) from error
        inside = {task for group in loaded.get("groups", {}).values() for task in group.get_all_tasks()}
        tops = [group for group in loaded.get("groups", {}).values() if group.name == name]
        made += tops or [task for task in loaded["tasks"].values() if task not in inside]
    return made


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows lm-eval's tasks and those of `include_path`; those alone where no other is named."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise OptionError(f"include_path {include_path} is no directory; name one that holds YAML files of tasks")
    users = TaskManager(include_path=str(include_path), include_defaults=False)
    tasks = [users.task_index.get(name) for name in names]
    if all(task is not None and task.cfg and "group" not in task.cfg for task in tasks):
        return users
    return TaskManager(include_path=str(include_path))


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


def check_chat(tasks: Sequence[Task]) -> None:
    """OptionError for a task that scores whole sentences, which mean nothing behind a chat template."""
    for task in tasks:
        if getattr(task, "multiple_input", 0) or task.get_config("doc_to_text") == "":
            raise OptionError(
                f"{task.task_name} scores whole sentences, which are no answers in a chat; leave chat and "
                "fewshot_as_multiturn out"
            )
