"""What a judge says of answers, in FastChat's records: single answers, and pairs in both orders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...files import json_text
from ...store.atomic import replace_file
from ...store.line_file import LineFile
from .answers import BenchAnswers
from .judge import Judge, JudgeBrief, NoJudgmentError
from .questions import TURNS, BenchQuestion
from .ratings import Winner, rating_of, verdict_of
from .rubric import JudgePrompt, Rubric, ask_pair, ask_single

JudgmentLine = dict[str, Any]
Prompted = tuple[JudgePrompt, str]


class SinglePlace(NamedTuple):
    """An answer to be rated."""

    question: BenchQuestion
    turn: int
    choice: int
    answers: BenchAnswers


class PairPlace(NamedTuple):
    """Two models' answers to be compared."""

    question: BenchQuestion
    turn: int
    first: BenchAnswers
    second: BenchAnswers


class Judging:
    """Judgments by one judge with one rubric. Each is in the journal as soon as it is given, and asked for once alone.

    The journal knows a judgment by the judge's model and all that it was told, so one of another answer is never taken.
    `failed`: reasons of judgments that were not given.
    """

    def __init__(self, judge: Judge, rubric: Rubric, journal: LineFile):
        self._judge, self._rubric, self._journal = judge, rubric, journal
        self._said = {line["key"]: line for line in journal.lines if isinstance(line.get("key"), str)}
        self.failed: list[str] = []

    def ask(
        self,
        singles: Sequence[SinglePlace],
        pairs: Sequence[PairPlace],
        *,
        parallel: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Let all be judged that is not yet. Raises JudgeError and DataError."""
        wanted: dict[str, JudgeBrief] = {}
        for prompt, text in self._prompts(singles, pairs):
            wanted[self._key(prompt, text)] = JudgeBrief(prompt.system, text)
        new = [key for key in wanted if key not in self._said]
        behind = len(wanted) - len(new)
        for done, (place, judgment) in enumerate(
            self._judge.ask_each([wanted[key] for key in new], parallel), behind + 1
        ):
            if isinstance(judgment, NoJudgmentError):
                self.failed.append(str(judgment))
            else:
                line = {"key": new[place], "judgment": judgment, "tstamp": time.time()}
                self._journal.add(line)
                self._said[new[place]] = line
            if progress is not None:
                progress(done, len(wanted))

    def singles(self, places: Iterable[SinglePlace]) -> list[JudgmentLine]:
        """The records of those that were rated; a rating that could not be read is -1."""
        records = []
        for place in places:
            prompt, text = self._single(place)
            if (said := self._said.get(self._key(prompt, text))) is None:
                continue
            record = {
                "question_id": place.question.id,
                "model": place.answers.model,
                "judge": [self._judge.model, prompt.name],
                "user_prompt": text,
                "judgment": said["judgment"],
                "score": rating_of(said["judgment"]),
                "turn": place.turn,
                "tstamp": said["tstamp"],
            }
            records.append(record | ({"choice": place.choice} if place.choice else {}))
        return records

    def pairs(self, places: Iterable[PairPlace]) -> list[JudgmentLine]:
        """The records of those that were compared in both orders."""
        records = []
        for place in places:
            both = [*self._both_orders(place)]
            said = [self._said.get(self._key(prompt, text)) for prompt, text in both]
            if said[0] is None or said[1] is None:
                continue
            names = {"A": "model_1", "B": "model_2"}
            turned = {"A": "model_2", "B": "model_1"}
            first, second = verdict_of(said[0]["judgment"]), verdict_of(said[1]["judgment"])
            records.append(
                {
                    "question_id": place.question.id,
                    "model_1": place.first.model,
                    "model_2": place.second.model,
                    "g1_winner": names.get(first, first),
                    "g2_winner": turned.get(second, second),
                    "judge": [self._judge.model, both[0][0].name],
                    "g1_user_prompt": both[0][1],
                    "g1_judgment": said[0]["judgment"],
                    "g2_user_prompt": both[1][1],
                    "g2_judgment": said[1]["judgment"],
                    "turn": place.turn,
                    "tstamp": max(said[0]["tstamp"], said[1]["tstamp"]),
                }
            )
        return records

    def _prompts(self, singles: Iterable[SinglePlace], pairs: Iterable[PairPlace]) -> Iterator[Prompted]:
        yield from map(self._single, singles)
        for place in pairs:
            yield from self._both_orders(place)

    def _single(self, place: SinglePlace) -> Prompted:
        turns = place.answers.turns[place.question.id, place.choice]
        return ask_single(self._rubric, place.question, turns, place.turn)

    def _both_orders(self, place: PairPlace) -> Iterator[Prompted]:
        first, second = (answers.turns[place.question.id, 0] for answers in (place.first, place.second))
        yield ask_pair(self._rubric, place.question, first, second, place.turn)
        yield ask_pair(self._rubric, place.question, second, first, place.turn)

    def _key(self, prompt: JudgePrompt, text: str) -> str:
        told = json_text([self._judge.model, prompt.name, prompt.system, text])
        return sha256(told.encode()).hexdigest()


def single_places(questions: Sequence[BenchQuestion], answers: BenchAnswers) -> list[SinglePlace]:
    """Every turn of every answer."""
    known = {question.id: question for question in questions}
    return [
        SinglePlace(known[number], turn, choice, answers)
        for number, choice in answers.turns
        if number in known
        for turn in range(1, TURNS + 1)
    ]


def pair_places(questions: Sequence[BenchQuestion], first: BenchAnswers, second: BenchAnswers) -> list[PairPlace]:
    """Every turn of the questions that both answered, by their first answers."""
    return [
        PairPlace(question, turn, first, second)
        for question in questions
        if (question.id, 0) in first.turns and (question.id, 0) in second.turns
        for turn in range(1, TURNS + 1)
    ]


def write_records(path: Path, records: Sequence[JudgmentLine]) -> None:
    """Records as a file of FastChat's `model_judgment`. Raises OSError."""
    replace_file(path, "".join(json_text(record) + "\n" for record in records).encode())


def outcome_of(record: JudgmentLine) -> Literal["win", "tie", "loss", "error"]:
    """For the first model: a win needs both orders, and so does a loss; an order without a verdict drops the pair."""
    winners: set[Winner | str] = {record["g1_winner"], record["g2_winner"]}
    if "error" in winners:
        return "error"
    if winners == {"model_1"}:
        return "win"
    return "loss" if winners == {"model_2"} else "tie"
