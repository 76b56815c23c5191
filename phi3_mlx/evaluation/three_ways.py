"""MMLU asked in three ways in one run: as the report lays a question out, as lm-eval does, and in the model's chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from .disk import task_with
from .questions import mmlu_subjects

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

THREE_WAYS = "mmlu_three_ways"
_REPORTED, _CHATTED = "mmlu_report_layout", "mmlu_chat"
_SHOTS = 5
_OPTIONS = "\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
_HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
# group -> what precedes all, and a question without its options
_LAYOUTS = {
    _REPORTED: (None, "Question:\n{{question.strip()}}\nOptions:"),
    "mmlu": (_HEADER, "{{question.strip()}}"),
    _CHATTED: (_HEADER, "{{question.strip()}}"),
}
NOTES = {
    _REPORTED: f"{_REPORTED} has the report's layout and MMLU's own examples of each subject: not the report's own "
    "shots, which mix subjects and were not published"
}


def mmlu_three_ways(
    data: Path | None, shots: int | None, apply_chat_template: Callable[..., str] | None
) -> list[Group]:
    """A group for each way: `mmlu_report_layout`, `mmlu` and `mmlu_chat`, with the same questions and examples.

    The report's layout (arXiv 2404.14219, appendix A) has no line about the subject. In the chat that line is the
    system message, and examples are turns. Raises OptionError without `data`, and DataError as `mmlu_subjects`.
    """
    if data is None:
        raise OptionError(f"{THREE_WAYS} takes MMLU's own files from data, a directory; give it")
    if apply_chat_template is None:
        raise OptionError(f"{THREE_WAYS} asks in a chat; give apply_chat_template")
    subjects, chat_kind = mmlu_subjects(data), _chat_task(apply_chat_template)
    bare = next((subject for subject, splits in subjects.items() if "dev" not in splits), None)
    if bare is not None and shots != 0:
        raise DataError(f"{data} has no examples for {bare} (dev/{bare}_dev.csv); give num_fewshot=0")
    return [
        _group(
            name,
            [
                task_with(
                    _config(f"{name}_{subject}", subject, header, question, _SHOTS if shots is None else shots),
                    splits,
                    chat_kind if name == _CHATTED else None,
                )
                for subject, splits in subjects.items()
            ],
        )
        for name, (header, question) in _LAYOUTS.items()
    ]


def _config(name: str, subject: str, header: str | None, question: str, shots: int) -> dict[str, Any]:
    return {
        "task": name,
        "test_split": "test",
        "fewshot_split": "dev" if shots else None,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "description": "" if header is None else header.format(subject.replace("_", " ")),
        "doc_to_text": question + _OPTIONS,
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metadata": {"version": 1},
    }


def _group(name: str, tasks: list[Task]) -> Group:
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]  # by question, as MMLU's total
    group = Group.from_config(GroupConfig(group=name, task=[], aggregate_metric_list=metrics))
    for task in tasks:
        group.add(task)
    return group


def _chat_task(apply_chat_template: Callable[..., str]) -> type[Task]:
    """A task whose questions are put into the chat template, whatever the others of the run are."""
    from lm_eval.api.task import ConfigurableTask

    class ChatTask(ConfigurableTask):
        def build_all_requests(self, **given: Any) -> None:
            chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": apply_chat_template}
            super().build_all_requests(**{**given, **chat})

    return ChatTask
