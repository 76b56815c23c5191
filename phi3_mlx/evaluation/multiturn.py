"""MT-bench: a model's answers to questions of two turns, and what a judge makes of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from ..files import json_text
from ..generation.loading import check_loaded, check_tokenizer
from ..models.decoder import Model
from ..option import arguments
from ..paths import expanded
from ..store.atomic import replace_file
from ..store.line_file import LineFile, alone_in, disk_faults
from ..values import optional, text
from ..values import path as as_path
from .mtbench.answers import Answering, BenchAnswers, write_answers
from .mtbench.judge import JUDGE_TOKENS, Judge
from .mtbench.judging import Judging, PairPlace, SinglePlace, pair_places, single_places, write_records
from .mtbench.questions import TURNS, BenchQuestion, find_files, read_answers, read_questions
from .mtbench.rubric import Rubric, read_rubric
from .mtbench.scores import pair_figures, score_difference, score_figures
from .options import EvalOptions, MtBenchOptions

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")


def mt_bench(
    model: Model,
    tokenizer: Tokenizer,
    output: str | os.PathLike[str],
    *,
    name: str,
    data: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    judge: str | None = MtBenchOptions.judge,
    judge_model: str | None = MtBenchOptions.judge_model,
    judge_key: str | None = MtBenchOptions.judge_key,
    judge_timeout: float = MtBenchOptions.judge_timeout,
    judge_retries: int = MtBenchOptions.judge_retries,
    judge_parallel: int = MtBenchOptions.judge_parallel,
    num_choices: int = MtBenchOptions.num_choices,
    turn_tokens: int = MtBenchOptions.turn_tokens,
    limit: int | None = EvalOptions.limit,
    system: str | None = EvalOptions.system,
    force: bool = EvalOptions.force,
    progress: Callable[[str, int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A model's answers to MT-bench, judged if a judge is named; all of it is kept in the folder `output`.

        results = mt_bench(*load("phi-3.5-mini-4bit"), "bench", name="phi-3.5-mini-4bit", data="mt_bench",
                           judge="https://api.openai.com/v1", judge_model="gpt-4o", judge_key="OPENAI_API_KEY")
        results["score"]["all"]["value"]

    `name`: what the files call the model. `data`: a directory with FastChat's `question.jsonl`, `reference_answer/` and
    `judge_prompts.jsonl`; None downloads questions and references. `against`: the name of a model whose answers are in
    `output` already, or FastChat's file of its answers: it is rated too, and the two are compared in pairs, in both
    orders. `limit`: questions of each category. `judge_key` names the environment variable of the judge's key.

    The folder has FastChat's files: `model_answer/NAME.jsonl`, `model_judgment/JUDGE_single.jsonl`, `JUDGE_pair.jsonl`;
    `mt_bench-NAME.json` is what this returns. `journal/` has every answer and judgment from when it was given: the same
    call again goes on from it. One process may write into a folder at a time. `progress(stage, done, total)`
    counts what was answered, then what was judged.

    Raises DataError for files that are not there, faulty or of another model, JudgeError for a judge that cannot be
    asked, OptionError, and what `generate` raises.
    """
    options = MtBenchOptions(**arguments(MtBenchOptions, locals()))
    check_loaded(model)
    check_tokenizer(tokenizer)
    directory = expanded(as_path(output, "output"))
    label = file_name(text(name, "name"))
    files = find_files(None if data is None else expanded(as_path(data, "data")))
    questions = read_questions(files, EvalOptions(limit=limit).limit)
    rubric = read_rubric(files.prompts)
    judge_asked = judge_of(options)
    if against is not None and judge_asked is None:
        raise OptionError("against has no effect without judge=URL, which compares; leave it out")
    started = time.time()
    with alone_in(directory):
        bench = _Bench(directory, questions, rubric)
        other = None if against is None else bench.answers_of(against, label)
        answering = Answering(
            model,
            tokenizer,
            max_tokens=options.turn_tokens,
            num_choices=options.num_choices,
            system=optional(text, system, "system"),
            force=force,
            progress=_stage(progress, "answering"),
            notify=notify,
        )
        answers = bench.answered(answering, label)
        results = {
            "model": label,
            "questions": str(files.questions),
            "without_reference": sum(q.needs_reference and q.reference is None for q in questions),
            "answers": {"turns": TURNS * len(answers.turns), "cut": answers.cut, "longest": options.turn_tokens},
            "system": system,
        }
        if judge_asked is not None:
            judging = _stage(progress, "judging")
            results |= bench.judged(judge_asked, answers, other, options.judge_parallel, judging)
        results |= {"seconds": round(time.time() - started, 1), "phi3_mlx_version": version("phi3-mlx")}
        bench.write(f"mt_bench-{label}.json", json_text(results, indent=2) + "\n")
    return results


def _stage(progress: Callable[[str, int, int], None] | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, stage)


def file_name(name: str) -> str:
    """A model's name as files have it: without slashes and blanks. Raises OptionError for one that has nothing else."""
    label = _NOT_IN_NAMES.sub("-", name).strip("-.")
    if not label:
        raise OptionError(f"name {name!r} names no file; give letters or digits")
    return label[:120]


def judge_of(options: MtBenchOptions) -> Judge | None:
    """The judge that the options name. OptionError for one that cannot be asked, before anything is answered."""
    if options.judge is None or options.judge_model is None:
        return None
    name, key = options.judge_key, None
    if name is not None and not (key := os.environ.get(name, "").strip()):
        raise OptionError(f"judge_key {name} is no environment variable that is set; type `export {name}=KEY`")
    timeout, retries = options.judge_timeout, options.judge_retries
    return Judge(options.judge, options.judge_model, key=key, timeout=timeout, retries=retries)


@dataclass(frozen=True)
class _Bench:
    """A folder of FastChat's layout, and what is asked there."""

    directory: Path
    questions: list[BenchQuestion]
    rubric: Rubric

    def answered(self, answering: Answering, name: str) -> BenchAnswers:
        """The model's answers; what there is of them is a file of `model_answer` however this ends."""
        journal = LineFile(self.directory / "journal" / f"answers-{name}.jsonl")
        try:
            return answering.answer(name, self.questions, journal)
        finally:
            path = self._place(f"model_answer/{name}.jsonl")
            with disk_faults(path):
                write_answers(path, name, journal)

    def answers_of(self, source: str | os.PathLike[str], label: str) -> BenchAnswers:
        """Another model's answers, by its name here or in a file of FastChat's."""
        path = expanded(as_path(source, "against"))
        if path.suffix != ".jsonl":
            path = self.directory / "model_answer" / f"{file_name(os.fspath(source))}.jsonl"
        if not path.exists():
            raise DataError(f"there are no answers of {os.fspath(source)}: {path} is not there")
        if path.stem == label:
            raise DataError(f"against is {label} itself; give the models two names")
        turns = {
            (number, choice): answer
            for number, choices in read_answers(path).items()
            for choice, answer in enumerate(choices)
        }
        if odd := [number for (number, _), answer in turns.items() if len(answer) != TURNS]:
            raise DataError(f"{path}: question {odd[0]} has no answer for each of {TURNS} turns")
        return BenchAnswers(path.stem, turns, cut=0)

    def judged(
        self,
        judge: Judge,
        answers: BenchAnswers,
        other: BenchAnswers | None,
        parallel: int,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Any]:
        """Ratings, and comparisons with the other model; what was said is in FastChat's files however this ends."""
        label = file_name(judge.model)
        judging = Judging(judge, self.rubric, LineFile(self.directory / "journal" / f"judgments-{label}.jsonl"))
        singles = single_places(self.questions, answers)
        others = [] if other is None else single_places(self.questions, other)
        pairs = [] if other is None else pair_places(self.questions, answers, other)
        try:
            judging.ask([*singles, *others], pairs, parallel=parallel, progress=progress)
        finally:
            self._write_judgments(label, judging, [*singles, *others], pairs)
        rated, compared = judging.singles(singles), judging.pairs(pairs)
        results: dict[str, Any] = {
            "judge": {
                "model": judge.model,
                "url": judge.url,
                "prompts": self.rubric.source,
                "prompts_digest": self.rubric.digest,
                "temperature": 0,
                "longest": JUDGE_TOKENS,
            },
            "score": score_figures(self.questions, rated),
            "failed": judging.failed,
        }
        if other is not None:
            rated_other = judging.singles(others)
            results["against"] = {
                "model": other.model,
                "score": score_figures(self.questions, rated_other),
                "difference": score_difference(rated, rated_other),
                "pairs": pair_figures(self.questions, compared),
            }
        return results

    def write(self, name: str, content: str) -> None:
        path = self._place(name)
        with disk_faults(path):
            replace_file(path, content.encode())

    def _write_judgments(
        self, label: str, judging: Judging, singles: list[SinglePlace], pairs: list[PairPlace]
    ) -> None:
        """FastChat's files, which have all models of the folder: those of others stay."""
        for kind, records in (("single", judging.singles(singles)), ("pair", judging.pairs(pairs))):
            path = self._place(f"model_judgment/{label}_{kind}.jsonl")
            models = {(record.get("model"), record.get("model_1"), record.get("model_2")) for record in records}
            kept = [
                line
                for line in LineFile(path).lines
                if (line.get("model"), line.get("model_1"), line.get("model_2")) not in models
            ]
            if records:
                with disk_faults(path):
                    write_records(path, [*kept, *records])

    def _place(self, name: str) -> Path:
        path = self.directory / name
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
