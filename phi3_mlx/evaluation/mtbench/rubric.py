"""What a judge is asked: FastChat's prompts where their file is given, else ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import Formatter

from ...errors import DataError
from .questions import BenchQuestion, json_lines

TurnTexts = tuple[str, ...]  # of one model to the turns of a question

_COMMON = "question", "question_1", "question_2", "ref_answer_1", "ref_answer_2"
_SLOTS = {
    "single": {*_COMMON, "answer", "answer_1", "answer_2"},
    "pair": {*_COMMON, "answer_a", "answer_b", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
}
_OUR_PREFIX = "phi3-mlx-"  # what the names of our own prompts begin with


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for the judge: `template` has places for questions, answers and references."""

    name: str
    system: str
    template: str

    def filled(self, values: Mapping[str, str]) -> str:
        """The template with these texts in its places. Nothing in a text counts as a place."""
        return "".join(
            before + ("" if place is None else values[place])
            for before, place, _, _ in Formatter().parse(self.template)
        )


@dataclass(frozen=True)
class Rubric:
    """The eight prompts of MT-bench: single answers or pairs, with a reference or without, of the first or second turn.

    `source` says whose they are: a file, or "phi3-mlx" of our own.
    """

    source: str
    prompts: Mapping[str, JudgePrompt]

    def single(self, question: BenchQuestion, turn: int) -> JudgePrompt:
        return self.prompts[_name("single", question, turn)]

    def pair(self, question: BenchQuestion, turn: int) -> JudgePrompt:
        return self.prompts[_name("pair", question, turn)]

    @property
    def digest(self) -> str:
        """Of everything that a judge is told beside questions and answers."""
        texts = sorted((prompt.name, prompt.system, prompt.template) for prompt in self.prompts.values())
        return sha256(repr(texts).encode()).hexdigest()[:16]


def ask_single(rubric: Rubric, question: BenchQuestion, answers: TurnTexts, turn: int) -> tuple[JudgePrompt, str]:
    """The prompt, and its text for the answer to a turn (1 or 2) of a question."""
    prompt = rubric.single(question, turn)
    values = {"answer": answers[0], "answer_1": answers[0], "answer_2": answers[1]}
    return prompt, prompt.filled(_shared(question) | values)


def ask_pair(rubric: Rubric, question: BenchQuestion, a: TurnTexts, b: TurnTexts, turn: int) -> tuple[JudgePrompt, str]:
    """The prompt, and its text for two models' answers to a turn of a question, A first."""
    prompt = rubric.pair(question, turn)
    values = {"answer_a": a[0], "answer_b": b[0]}
    values |= {"answer_a_1": a[0], "answer_a_2": a[1], "answer_b_1": b[0], "answer_b_2": b[1]}
    return prompt, prompt.filled(_shared(question) | values)


def _shared(question: BenchQuestion) -> dict[str, str]:
    first, second = question.turns
    references = question.reference or ("", "")
    return {
        "question": first,
        "question_1": first,
        "question_2": second,
        "ref_answer_1": references[0],
        "ref_answer_2": references[1],
    }


def _name(kind: str, question: BenchQuestion, turn: int) -> str:
    """The name that FastChat has for it. Without a reference the general prompt is asked."""
    referenced = question.needs_reference and question.reference is not None
    name = "single-math-v1" if referenced else "single-v1"
    if kind == "pair":
        name = "pair-math-v1" if referenced else "pair-v2"
    return f"{name}-multi-turn" if turn > 1 else name


_PROMPT_NAMES = [
    f"{name}{turn}"
    for name in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    for turn in ("", "-multi-turn")
]


def read_rubric(path: Path | None) -> Rubric:
    """The prompts of FastChat's `judge_prompts.jsonl`; ours without a file.

    Raises DataError for a file that lacks one of the eight, or has a place that nothing can fill.
    """
    if path is None:
        return Rubric("phi3-mlx", _ours())
    prompts = {}
    for line in json_lines(path):
        name = line.text("name")
        if name not in _PROMPT_NAMES:
            continue  # FastChat's file has had others
        template = line.text("prompt_template")
        _check_places(template, name, str(line.source))
        prompts[name] = JudgePrompt(name, line.text("system_prompt"), template)
    if missing := [name for name in _PROMPT_NAMES if name not in prompts]:
        raise DataError(f"{path} lacks the prompt {missing[0]}; it needs {', '.join(_PROMPT_NAMES)}")
    return Rubric(str(path), prompts)


def _check_places(template: str, name: str, source: str) -> None:
    kind = name.partition("-")[0]
    try:
        places = [(place, how, turned) for _, place, how, turned in Formatter().parse(template) if place is not None]
    except ValueError as error:
        raise DataError(f"{source}: prompt_template of {name} has a stray brace: {error}") from None
    for place, how, turned in places:
        if place not in _SLOTS[kind] or how or turned:
            raise DataError(
                f"{source}: prompt_template of {name} has the place {{{place}}}, which nothing fills; "
                f"known are {', '.join(sorted(_SLOTS[kind]))}"
            )


# Our own words.

_GRADE = (
    "You grade the work of an AI assistant. Weigh whether it does what was asked, whether what it says is true, and "
    "whether it is complete and clear. Length alone is no merit. First say in a few sentences what is good and what is "
    "wrong. Then end with a grade from 1 (useless) to 10 (nothing to improve), written in double brackets: [[7]]"
)
_DECIDE = (
    "You compare the work of two AI assistants, A and B, on the same task. Weigh whether each does what was asked, "
    "whether what it says is true, and whether it is complete and clear. Neither the order in which they appear nor "
    "their length may count. First say in a few sentences how they differ. Then end with your decision in double "
    "brackets: [[A]] if A is better, [[B]] if B is better, [[C]] if neither is."
)
_CHECK = " A correct solution is given: compare with it step by step, and name each mistake before you decide."
_LATER = " Decide by the last answer alone; what came before shows what it replies to."


def _ours() -> dict[str, JudgePrompt]:
    prompts = {}
    for name in _PROMPT_NAMES:
        kind, referenced, later = name.partition("-")[0], "math" in name, name.endswith("multi-turn")
        system = _GRADE if kind == "single" else _DECIDE
        system += (_CHECK if referenced else "") + (_LATER if later else "")
        letters = ("",) if kind == "single" else ("a", "b")
        parts = [_conversation("Correct solution", "ref_answer", later, referenced=True)] if referenced else []
        parts += [
            _conversation(f"Assistant {letter.upper()}".strip(), f"answer_{letter}".strip("_"), later)
            for letter in letters
        ]
        if not later:
            parts.insert(0, "== Task ==\n{question}")
        prompts[name] = JudgePrompt(_OUR_PREFIX + name, system, "\n\n".join(parts))
    return prompts


def _conversation(who: str, answer: str, later: bool, *, referenced: bool = False) -> str:
    if not later:
        return f"== {who} ==\n{{{answer}{'_1' if referenced else ''}}}"
    turns = [f"-- Task {turn} --\n{{question_{turn}}}\n-- {who} --\n{{{answer}_{turn}}}" for turn in (1, 2)]
    return f"== {who}, both turns ==\n" + "\n".join(turns)
