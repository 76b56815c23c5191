"""What judgments amount to: scores by category with intervals, and wins of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..figures import drawn_bounds
from .judging import JudgmentLine, outcome_of
from .questions import BenchQuestion

RESAMPLES = 10_000
_DRAWS_SEED = 1234
_LEAST_RATING, _MOST_RATING = 0.0, 10.0  # a number beyond them is no rating
_WORTH = {"win": 1.0, "tie": 0.5, "loss": 0.0}

Values = Mapping[int, Sequence[float]]  # of a question, those that count


def score_figures(questions: Sequence[BenchQuestion], records: Iterable[JudgmentLine]) -> dict[str, Any]:
    """The mean rating of all turns, of each turn and category, with 95 % intervals over the questions.

    `dropped` counts judgments without a rating, which no mean has.
    """
    rated: list[tuple[int, int, float]] = []
    dropped = 0
    for record in records:
        if _LEAST_RATING <= record["score"] <= _MOST_RATING:
            rated.append((record["question_id"], record["turn"], record["score"]))
        else:
            dropped += 1
    categories = _categories(questions)
    return {
        "all": interval(_by_question(rated)),
        "turns": {str(turn): interval(_by_question(r for r in rated if r[1] == turn)) for turn in (1, 2)},
        "categories": {
            category: interval(_by_question(r for r in rated if r[0] in members))
            for category, members in categories.items()
        },
        "dropped": dropped,
    }


def score_difference(records: Iterable[JudgmentLine], others: Iterable[JudgmentLine]) -> dict[str, Any]:
    """How much higher the first records' mean rating is than the others', on turns that both were rated for."""
    ratings: list[dict[tuple[int, int, int], float]] = [
        {
            (record["question_id"], record["turn"], record.get("choice", 0)): record["score"]
            for record in some
            if _LEAST_RATING <= record["score"] <= _MOST_RATING
        }
        for some in (records, others)
    ]
    shared = sorted({*ratings[0]} & {*ratings[1]})
    return interval(_by_question((key[0], key[1], ratings[0][key] - ratings[1][key]) for key in shared))


def pair_figures(questions: Sequence[BenchQuestion], records: Sequence[JudgmentLine]) -> dict[str, Any]:
    """Wins, ties and losses of the first model over both turns, and its adjusted win rate, (wins + ties / 2) / all.

    `turned`: of these, pairs where the judge changed its mind with the order. `dropped`: pairs without a verdict.
    """
    outcomes = [outcome_of(record) for record in records]
    counts = {name: outcomes.count(name) for name in ("win", "tie", "loss")}
    turned = sum(
        {record["g1_winner"], record["g2_winner"]} == {"model_1", "model_2"}
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome != "error"
    )
    rates = [
        (record["question_id"], record["turn"], _WORTH[outcome])
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome != "error"
    ]
    return {
        **counts,
        "dropped": outcomes.count("error"),
        "turned": turned,
        "adjusted_win_rate": interval(_by_question(rates)),
        "categories": {
            category: interval(_by_question(rate for rate in rates if rate[0] in members))
            for category, members in _categories(questions).items()
        },
    }


def interval(values: Values, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The mean of all values with its 95 % interval: questions are drawn again, each with all its values.

    None for value and bounds where there is no value; for the bounds where the draws do not differ, which is no
    certainty: one question, or as much in all.
    """
    sums = np.array([np.sum(several) for several in values.values()], dtype=np.float64)  # (questions,)
    counts = np.array([len(several) for several in values.values()], dtype=np.float64)
    told = {"questions": len(values), "judgments": int(counts.sum())}
    if not len(values):
        return {"value": None, "low": None, "high": None, **told}
    drawn = np.random.default_rng(_DRAWS_SEED).integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return {"value": float(sums.sum() / counts.sum()), **drawn_bounds(means), **told}


def _by_question(rated: Iterable[tuple[int, int, float]]) -> Values:
    values: dict[int, list[float]] = {}
    for number, _, value in rated:
        values.setdefault(number, []).append(value)
    return values


def _categories(questions: Iterable[BenchQuestion]) -> dict[str, set[int]]:
    categories: dict[str, set[int]] = {}
    for question in questions:
        categories.setdefault(question.category, set()).add(question.id)
    return categories
