"""A model's answers to MT-bench: both turns of each question, the second after the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.identity import model_fingerprint
from ...files import json_text
from ...generation.answering import answer_each
from ...generation.answers import encode_prompt
from ...generation.request import Request
from ...models.decoder import Model
from ...store.atomic import replace_file
from ...store.line_file import LineFile, head_of
from .questions import TURNS, BenchQuestion

if TYPE_CHECKING:
    from ...text.tokenizer import Tokenizer

_BENCH_FORMAT = 1
TurnPlace = tuple[int, int, int]  # question, choice (0: the first), turn (1: the first)


@dataclass(frozen=True)
class BenchAnswers:
    """What a model answered: `turns` by question and choice; `cut` counts turns that their budget ended."""

    model: str
    turns: dict[tuple[int, int], tuple[str, ...]]
    cut: int


class Answering:
    """The model that answers, and how. `seed` of a draw is the number of the choice, as in FastChat."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        num_choices: int,
        system: str | None,
        force: bool,
        progress: Callable[[int, int], None] | None,
        notify: Callable[[str], None] | None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._max_tokens, self._choices, self._system, self._force = max_tokens, num_choices, system, force
        self._progress, self._notify = progress, notify
        self._said: set[str] = set()

    def answer(self, name: str, questions: Sequence[BenchQuestion], journal: LineFile) -> BenchAnswers:
        """The answers to all questions, from the journal where it has them; each new one is written there at once.

        Raises DataError if the journal is another model's, and what `generate` raises.
        """
        identity = {"model_id": name, "model": model_fingerprint(self._model), "turn_tokens": self._max_tokens}
        journal.begin(head_of("mt_bench", _BENCH_FORMAT, identity), "name another directory")
        known = {_place(line): line for line in journal.lines if "turn" in line}
        texts: dict[TurnPlace, str] = {}
        cut = 0
        for turn in range(1, TURNS + 1):
            asked = [self._asked(question, choice, turn, texts) for question in questions for choice in self._all]
            new = []
            for place, ids, request in asked:
                line = known.get(place)
                if line is not None and line.get("prompt_hash") == _hash(ids):
                    texts[place] = str(line["text"])
                    cut += line["finish_reason"] == "length"
                else:
                    new.append((place, ids, request))
            done = turn * len(asked) - len(new)
            for number, answer in answer_each(
                self._model,
                self._tokenizer,
                [(ids, request) for _, ids, request in new],
                force=self._force,
            ):
                place, ids, _ = new[number]
                texts[place] = answer.text.strip()
                cut += answer.finish_reason == "length"
                journal.add(
                    dict(zip(("question_id", "choice", "turn"), place, strict=True))
                    | {"text": texts[place], "finish_reason": answer.finish_reason, "prompt_hash": _hash(ids)}
                    | {"tstamp": time.time()}
                )
                done += 1
                if self._progress is not None:
                    self._progress(done, TURNS * len(asked))
        turns = {
            (question.id, choice): tuple(texts[question.id, choice, turn] for turn in range(1, TURNS + 1))
            for question in questions
            for choice in self._all
        }
        return BenchAnswers(name, turns, cut)

    @property
    def _all(self) -> range:
        return range(self._choices)

    def _asked(
        self, question: BenchQuestion, choice: int, turn: int, texts: dict[TurnPlace, str]
    ) -> tuple[TurnPlace, list[int], Request]:
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for earlier in range(1, turn):
            messages.append({"role": "user", "content": question.turns[earlier - 1]})
            messages.append({"role": "assistant", "content": texts[question.id, choice, earlier]})
        messages.append({"role": "user", "content": question.turns[turn - 1]})
        request = Request(
            temperature=question.temperature, seed=choice, max_tokens=self._max_tokens, lookup=0, force=self._force
        )
        ids = encode_prompt(self._tokenizer, messages, notify=self._say_once)
        return (question.id, choice, turn), ids, request

    def _say_once(self, sentence: str) -> None:
        if self._notify is not None and sentence not in self._said:
            self._said.add(sentence)
            self._notify(sentence)


def write_answers(path: Path, name: str, journal: LineFile) -> None:
    """Questions that the journal has all turns of, as FastChat's `model_answer/NAME.jsonl`, in order of their ids.

    Raises OSError.
    """
    texts = {_place(line): line for line in journal.lines if "turn" in line}
    by_question: dict[int, list[dict[str, Any]]] = {}
    stamps: dict[int, float] = {}
    for number, choice in sorted({place[:2] for place in texts}):
        lines = [texts.get((number, choice, turn)) for turn in range(1, TURNS + 1)]
        if None not in lines:
            turns = [line["text"] for line in lines if line is not None]
            by_question.setdefault(number, []).append({"index": choice, "turns": turns})
            stamps[number] = max(line["tstamp"] for line in lines if line is not None)
    written = []
    for number, choices in by_question.items():
        answer = sha256(json_text([name, number, choices]).encode()).hexdigest()[:22]
        line = {"question_id": number, "answer_id": answer, "model_id": name, "choices": choices}
        written.append(json_text(line | {"tstamp": stamps[number]}) + "\n")
    replace_file(path, "".join(written).encode())


def _place(line: dict[str, Any]) -> TurnPlace:
    return line["question_id"], line["choice"], line["turn"]


def _hash(ids: Sequence[int]) -> str:
    return sha256(repr(list(ids)).encode()).hexdigest()[:16]
