"""MT-bench's questions and reference answers, in FastChat's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ...fields import Fields
from ..questions import lines_of
from ..quiet import quiet

TURNS = 2
# Of a category; those of writing and roleplay are drawn, and facts are not.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHERS = 0.7  # of a category that MT-bench lacks, as in FastChat
WITH_REFERENCE = ("math", "reasoning", "coding")
QUESTIONS, PROMPTS, REFERENCES = "question.jsonl", "judge_prompts.jsonl", "reference_answer"
_SPACE, _IN_SPACE = "lmsys/mt-bench", "data/mt_bench"  # FastChat's own copy of its data, on the Hugging Face hub
_REFERENCE_MODEL = "gpt-4"
_ADVICE = "the questions are FastChat's question.jsonl"


@dataclass(frozen=True)
class BenchQuestion:
    """A question of MT-bench: two turns, and where there is one the answer to each to compare with."""

    id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, _OTHERS)

    @property
    def needs_reference(self) -> bool:
        """Whether MT-bench judges its answers against a reference."""
        return self.category in WITH_REFERENCE


@dataclass(frozen=True)
class BenchFiles:
    """Where MT-bench's files are; `prompts` is None where the judge's prompts are not given."""

    questions: Path
    references: Path | None
    prompts: Path | None


def find_files(directory: Path | None) -> BenchFiles:
    """FastChat's files in a directory, or in its folder `mt_bench`; without a directory, downloaded.

    `judge_prompts.jsonl` may stand in either. Raises DataError where there are no questions.
    """
    if directory is None:
        return _downloaded()
    for root in (directory, directory / "mt_bench"):
        if (root / QUESTIONS).exists():
            break
    else:
        raise DataError(
            f"{directory} has no MT-bench: looked for {QUESTIONS} there and in its folder mt_bench. Get it from "
            f"FastChat (fastchat/llm_judge/{_IN_SPACE})"
        )
    # FastChat keeps them beside the folder mt_bench.
    places = [directory / PROMPTS, root / PROMPTS, *([root.parent / PROMPTS] if root.name == "mt_bench" else [])]
    references = sorted((root / REFERENCES).glob("*.jsonl"))
    if len(references) > 1:
        references = [path for path in references if path.stem == _REFERENCE_MODEL] or references
    return BenchFiles(
        root / QUESTIONS, references[0] if references else None, next((path for path in places if path.exists()), None)
    )


def read_questions(files: BenchFiles, limit: int | None = None) -> list[BenchQuestion]:
    """The questions in the file's order, at most `limit` of each category.

    Raises DataError for a line that is no question of two turns, and for an id that is given twice.
    """
    references = {} if files.references is None else _references(files.references)
    questions: dict[int, BenchQuestion] = {}
    counts: dict[str, int] = {}
    for line in json_lines(files.questions):
        number, category = line.whole("question_id"), line.text("category")
        if number in questions:
            raise DataError(f"{line.source}: question_id {number} is given twice; {_ADVICE}")
        turns = _texts(line, "turns")
        if len(turns) != TURNS:
            line.fail("turns", f"{TURNS} texts")
        reference = _texts(line, "reference") if line.raw.get("reference") else references.get(number)
        if reference is not None and len(reference) != TURNS:
            raise DataError(f"{files.references or line.source}: question {number} has no reference for each turn")
        counts[category] = counts.get(category, 0) + 1
        if limit is None or counts[category] <= limit:
            questions[number] = BenchQuestion(number, category, turns, reference)
    if not questions:
        raise DataError(f"{files.questions} has no question; {_ADVICE}")
    return list(questions.values())


def read_answers(path: Path) -> dict[int, list[tuple[str, ...]]]:
    """The turns of each choice, by question, of a file of FastChat's `model_answer` or `reference_answer`."""
    answers: dict[int, list[tuple[str, ...]]] = {}
    for line in json_lines(path):
        choices = line.raw.get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, Mapping) for choice in choices):
            line.fail("choices", "a list of objects with turns")
        several = [Fields(choice, line.source, DataError, within="choices.") for choice in choices]
        answers[line.whole("question_id")] = [_texts(choice, "turns") for choice in several]
    return answers


def _references(path: Path) -> dict[int, tuple[str, ...]]:
    return {number: choices[0] for number, choices in read_answers(path).items()}


def _texts(line: Fields, key: str) -> tuple[str, ...]:
    value = line.raw.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        line.fail(key, "a list of texts")
    return tuple(value)


def json_lines(path: Path) -> Iterator[Fields]:
    """The lines of a file of JSON objects. Raises DataError for a file or a line that is none."""
    return (Fields(value, source, DataError) for value, source in lines_of(path))


def _downloaded() -> BenchFiles:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> Path:
        return Path(hf_hub_download(_SPACE, f"{_IN_SPACE}/{name}", repo_type="space"))

    try:
        with quiet("huggingface_hub"):
            questions, references = get(QUESTIONS), get(f"{REFERENCES}/{_REFERENCE_MODEL}.jsonl")
    except Exception as error:  # the transports of huggingface_hub share no class across their versions
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"MT-bench's questions cannot be downloaded ({why}); name a directory that has FastChat's {QUESTIONS} with "
            "data=DIR"
        ) from error
    return BenchFiles(questions, references, None)
