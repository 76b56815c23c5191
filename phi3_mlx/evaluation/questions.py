"""Questions on disk: MMLU's CSV files, lines of JSON, and a user's own; each as lm-eval's tasks know it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fields import kind_of, parse, shorten
from ..files import not_unicode, read_bytes, read_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Question = dict[str, Any]
_MMLU_COLUMNS = 6  # question, four choices, the letter of the answer
_SPLITS = {"train": ("train",), "validation": ("validation", "dev", "val"), "test": ("test",)}


def mmlu_subjects(directory: Path) -> dict[str, dict[str, list[Question]]]:
    """MMLU's own layout, `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, in a directory or its folder `mmlu`.

    By subject and split. Raises DataError for no such files, and for a row that is none.
    """
    root = directory / "mmlu" if (directory / "mmlu").is_dir() else directory
    tests = sorted((root / "test").glob("*_test.csv"))
    if not tests:
        raise DataError(f"{directory} has no MMLU: looked for test/SUBJECT_test.csv there and in its folder mmlu")
    subjects = {}
    for path in tests:
        subject = path.name.removesuffix("_test.csv")
        subjects[subject] = {"test": _mmlu_file(path)}
        shots = root / "dev" / f"{subject}_dev.csv"
        if shots.exists():
            subjects[subject]["dev"] = _mmlu_file(shots)
    return subjects


def _mmlu_file(path: Path) -> list[Question]:
    questions = []
    for number, row in enumerate(csv.reader(io.StringIO(text_of(path), newline="")), 1):
        if len(row) != _MMLU_COLUMNS or row[-1].strip() not in [*"ABCD"]:
            raise DataError(
                f"{path}: row {number} is {shorten(row)}; expected a question, four choices and A, B, C or D"
            )
        questions.append({"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5].strip())})
    return questions


def task_splits(directory: Path, task: str, read: Callable[[Question, str], Question]) -> dict[str, list[Question]]:
    """The splits of a task whose questions are lines of JSON: `TASK_test.jsonl` or `TASK/test.jsonl`, and the like.

    Raises DataError where there is neither a test nor a validation split, and for a line that is no question of the
    task.
    """
    splits: dict[str, list[Question]] = {}
    for split, names in _SPLITS.items():
        for name in names:
            for path in (directory / f"{task}_{name}.jsonl", directory / task / f"{name}.jsonl"):
                if split not in splits and path.exists():
                    splits[split] = [read(line, source) for line, source in lines_of(path)]
    if not splits.get("test") and not splits.get("validation"):
        raise DataError(
            f"{directory} has no {task}: looked for {task}_test.jsonl and {task}/test.jsonl, and the same with "
            "validation, dev or val"
        )
    return splits


def arc_question(line: Question, source: str) -> Question:
    """A question of ARC as the hub has it, from that, or from {question, choices, answer}, or as AI2 publishes it."""
    if isinstance(line.get("question"), Mapping):  # {"stem": ..., "choices": [{"text": ..., "label": ...}]}
        stem = line["question"]
        choices = stem.get("choices") or ()
        line = {**line, "question": stem.get("stem"), "choices": _columns(choices, source)}
    if isinstance(line.get("choices"), Mapping):
        texts, labels = line["choices"].get("text"), line["choices"].get("label")
        key = line.get("answerKey")
        if not isinstance(texts, list) or not isinstance(labels, list) or key not in labels:
            raise DataError(f"{source}: is no question of ARC; expected choices with text and label, and an answerKey")
        line = {"question": line.get("question"), "choices": texts, "answer": labels.index(key)}
    question = own_question(line, source)
    if "letters" not in question:
        raise DataError(f"{source}: choices is missing; expected a list of texts")
    return {
        "question": question["question"],
        "choices": {"text": question["choices"], "label": question["letters"]},
        "answerKey": question["letters"][question["answer"]],
    }


def _columns(choices: Sequence[Any], source: str) -> dict[str, list[Any]]:
    if not all(isinstance(choice, Mapping) for choice in choices):
        raise DataError(f"{source}: choices is {shorten(choices)}; expected objects with text and label")
    return {key: [choice.get(key) for choice in choices] for key in ("text", "label")}


def worded_question(line: Question, source: str) -> Question:
    """A question and its answer, both texts, as GSM8K's."""
    question = own_question({**line, "choices": None}, source)
    return {"question": question["question"], "answer": question["answer"]}


def own_questions(path: Path) -> list[Question]:
    """A user's questions: a line of JSON each, {question, choices, answer} or {question, answer}, all of one kind.

    With choices `answer` becomes the place of the right one, and `letters` has a letter for each. Raises DataError,
    which names the line.
    """
    questions = [own_question(line, source) for line, source in lines_of(path)]
    if not questions:
        raise DataError(f"{path} holds no questions; write one JSON object a line")
    choosing = ["letters" in question for question in questions]
    if len({*choosing}) > 1:
        other = choosing.index(not choosing[0]) + 1
        raise DataError(f"{path}: question {other} is of another kind than the first; give choices to all or to none")
    return questions


def own_question(line: Question, source: str) -> Question:
    """A question with choices, or one whose answer is a text."""
    question, choices, answer = (line.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{source}: question is {kind_of(question)}; expected a text")
    if choices is None:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise DataError(f"{source}: answer is {kind_of(answer)}; expected a text")
        return {"question": question, "answer": str(answer)}
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{source}: choices is {shorten(choices)}; expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{source}: has {len(choices)} choices; give 2 to {len(LETTERS)}")
    letters = [*LETTERS[: len(choices)]]
    return {
        "question": question,
        "choices": choices,
        "letters": letters,
        "answer": _place(answer, choices, letters, source),
    }


def _place(answer: Any, choices: list[str], letters: list[str], source: str) -> int:
    """Where the right choice is: `answer` is its place from 0, its text, or its letter."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    for known in (choices, letters):
        if answer in known:
            return known.index(answer)
    raise DataError(
        f"{source}: answer is {shorten(answer)}; expected the right choice, its letter, or its place from 0 to "
        f"{len(choices) - 1}"
    )


def lines_of(path: Path) -> Iterator[tuple[Question, str]]:
    """The objects of a file of JSON lines, each with what messages call its place."""
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            value = parse(line)
        except ValueError as error:
            raise DataError(f"{source}: is not JSON ({error}); expected one JSON object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{source}: is {kind_of(value)}; expected an object")
        yield value, source


def text_of(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} {not_unicode(error, read_bytes(path), path)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; name a readable file of questions") from error
