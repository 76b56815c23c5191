"""Questions on disk of tasks that are no plain questions: sentences with a gap, pairs of sentences, and their like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fields import kind_of, parse, shorten
from .questions import Question, lines_of, text_of

ReadLine = Callable[[Question, str], Question]  # of a line, and of what messages call its place
Subjects = dict[str, dict[str, list[Question]]]  # of each part of a family its splits


def winogrande_question(line: Question, source: str) -> Question:
    """A sentence with one gap `_`, two options, and the right one's number."""
    question = _texts(line, source, "sentence", "option1", "option2")
    if question["sentence"].count("_") != 1:
        raise DataError(f"{source}: sentence is {shorten(question['sentence'])}; expected one gap, written _")
    answer = str(line.get("answer"))
    if answer not in ("1", "2"):
        raise DataError(f"{source}: answer is {shorten(line.get('answer'))}; expected 1 or 2")
    return {**question, "answer": answer}


def hellaswag_question(line: Question, source: str) -> Question:
    """The beginning of a scene and its endings, as its makers and the hub have them."""
    question = _texts(line, source, "activity_label", "ctx_a")
    later, endings, label = line.get("ctx_b"), line.get("endings"), str(line.get("label"))
    if not isinstance(later, str):
        raise DataError(f"{source}: ctx_b is {kind_of(later)}; expected a text, perhaps an empty one")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(each, str) for each in endings):
        raise DataError(f"{source}: endings is {shorten(endings)}; expected a list of texts")
    if label not in map(str, range(len(endings))):
        raise DataError(f"{source}: label is {shorten(line.get('label'))}; expected 0 to {len(endings) - 1}")
    return {**question, "ctx_b": later, "endings": endings, "label": label}


def svamp_question(line: Question, source: str) -> Question:
    """A sum in words: what is known, what is asked, and the number."""
    question = _texts(line, source, "Body", "sQuestion")
    number = line.get("lSolutions")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise DataError(f"{source}: lSolutions is {kind_of(number)}; expected a number")
    return {"question": f"{question['Body']} {question['sQuestion']}", "answer": f"{number:g}"}


def blimp_phenomena(directory: Path) -> Subjects:
    """BLiMP's pairs of sentences: `blimp.jsonl` with all, told apart by their UID, or a file `blimp/UID.jsonl` each."""
    whole = directory / "blimp.jsonl"
    files = [whole] if whole.exists() else _files(directory, "blimp", "jsonl")
    if not files:
        raise DataError(
            f"{directory} has no BLiMP: looked for blimp.jsonl, and for files UID.jsonl in its folder blimp"
        )
    subjects: Subjects = {}
    for line, source in (pair for path in files for pair in lines_of(path)):
        question = _texts(line, source, "sentence_good", "sentence_bad", "UID")
        subjects.setdefault(question.pop("UID"), {"train": []})["train"].append(question)  # the hub's one split
    return subjects


def bbh_tasks(directory: Path) -> Subjects:
    """BBH as its makers publish it, `bbh/TASK.json` with {"examples": [{"input", "target"}]}."""
    subjects: Subjects = {}
    for path in _files(directory, "bbh", "json"):
        try:
            value = parse(text_of(path))
        except ValueError as error:
            raise DataError(f"{path}: is not JSON ({error}); expected an object with examples") from error
        examples = value.get("examples") if isinstance(value, Mapping) else None
        if not isinstance(examples, list) or not all(isinstance(each, Mapping) for each in examples) or not examples:
            raise DataError(f"{path}: expected an object whose examples are a list of objects")
        subjects[path.stem] = {
            "test": [_texts(each, f"{path}: example {i}", "input", "target") for i, each in enumerate(examples, 1)]
        }
    if not subjects:
        raise DataError(f"{directory} has no BBH: looked for files TASK.json in its folder bbh")
    return subjects


def _files(directory: Path, folder: str, ending: str) -> list[Path]:
    return sorted((directory / folder).glob(f"*.{ending}"))


def _texts(line: Mapping[str, Any], source: str, *keys: str) -> Question:
    """These fields, each of which must be a text."""
    for key in keys:
        if not isinstance(line.get(key), str) or not line[key].strip():
            raise DataError(f"{source}: {key} is {shorten(line.get(key))}; expected a text")
    return {key: line[key] for key in keys}
