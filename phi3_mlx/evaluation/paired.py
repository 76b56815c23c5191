"""Two models that were asked the same questions: how far apart they are, and whether that can be chance.

The models answer the same questions, so most of what makes a figure uncertain (which questions were asked) is the same
for both. What counts are the questions that one model gets right and the other does not, the *flips*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import DataError
from .samples import choice_logprobs

CHANCE = 0.05  # a difference this likely, or likelier, without any between the models is none that can be seen
_Z95, _Z80 = 1.959964, 0.841621  # quantiles of the normal distribution: 97.5 %, 80 %
_LEAST_SHOWN = 0.001  # of p-values
_LEAST_FLIPS = 6  # in one direction: five could be chance (p = .063), six are not (.031)
_DRAWS, _DRAWING_SEED = 2000, 1234
_DRAWN_AT_ONCE = 1 << 22  # numbers


@dataclass(frozen=True)
class PairedFigure:
    """One metric of one task or group for two models, `before` (the one to be compared with) and `after`.

    `interval`: 95 % of the `difference` after - before. Of a metric that is right or wrong, `lost` and `won` name the
    questions (task, doc_id) that only the model before, and only the one after, got right, and `chance` is McNemar's
    exact two-sided p; of others they are None. `kl`: mean KL(before || after) of the choices' distributions, in nats;
    None without choices. `smallest`: the difference that this many questions would show in four of five cases.
    """

    task: str
    metric: str
    filtered: str
    questions: int
    before: float
    after: float
    interval: tuple[float, float] | None
    lost: tuple[tuple[str, int], ...] | None = None
    won: tuple[tuple[str, int], ...] | None = None
    chance: float | None = None
    kl: float | None = None
    smallest: float | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def is_visible(self) -> bool:
        """Whether the models differ by more than chance would have it."""
        if self.chance is not None:
            return self.chance < CHANCE
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def verdict(self) -> str:
        """What can be said of the difference, in a sentence."""
        if self.interval is None:
            return "of one document nothing can be said"
        asked = f"{self.questions:,} question{'s' if self.questions != 1 else ''}"
        if self.is_visible:
            if self.chance is None:
                return "the difference is more than chance"
            least = "" if self.chance < _LEAST_SHOWN else "= "
            return f"the difference is more than chance (p {least}{p_text(self.chance)})"
        if self.smallest is None:
            return f"no difference can be seen with {asked}"
        if self.smallest >= 1:
            return f"no difference can be seen with {asked}, which are too few for any"
        points = f"{100 * self.smallest:.1f} points"
        return f"no difference can be seen with {asked} (the smallest visible one is about {points})"


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p of this many flips each way, if both ways were equally likely."""
    flips, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(flips, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**flips)


def smallest_visible(questions: int, flips: int) -> float:
    """The difference that McNemar's test finds in four of five cases at p < .05, if this many questions flip.

    It is at least six flips one way, and where fewer flip, six.
    """
    least = _LEAST_FLIPS / questions
    share = max(flips, _LEAST_FLIPS) / questions
    if share >= 1:
        return 1.0
    # difference d: d sqrt(n) = z95 sqrt(share) + z80 sqrt(share - d^2), solved for d
    a, b, c = questions + _Z80**2, _Z95 * math.sqrt(share * questions), share * (_Z95**2 - _Z80**2)
    return min(1.0, max(least, (b + math.sqrt(max(b * b - a * c, 0.0))) / a))


def difference_interval(questions: int, lost: int, won: int) -> tuple[float, float]:
    """95 % of the difference of two shares of the same questions, after - before.

    Half a question is added to each of the four kinds (Agresti and Min, Statistics in Medicine 24, 2005): without it
    the interval would have no width where nothing flips.
    """
    n, lost_half, won_half = questions + 2, lost + 0.5, won + 0.5
    middle = (won_half - lost_half) / n
    half = _Z95 * math.sqrt(lost_half + won_half - (won_half - lost_half) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def resampled(
    before: np.ndarray, after: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float] | None:
    """95 % of figure(after) - figure(before) over draws of questions, the same for both models; None for one question.

    The arrays have a row a question; `figure` makes (draws,) of (draws, questions, ...).
    """
    count = len(before)
    if count < 2:
        return None
    differences = [figure(after[drawn]) - figure(before[drawn]) for drawn in draws(count)]
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)


def draws(count: int) -> Iterator[np.ndarray]:
    """Questions drawn with replacement: arrays (draws, count), together a fixed number of draws."""
    generator = np.random.default_rng(_DRAWING_SEED)
    rows = max(1, _DRAWN_AT_ONCE // count)
    for first in range(0, _DRAWS, rows):
        yield generator.integers(count, size=(min(rows, _DRAWS - first), count))


def perplexities(rows: np.ndarray) -> np.ndarray:
    """Of (..., documents, 2), each document's log-probability and how many words, bytes or tokens it has."""
    return np.exp(-rows[..., 0].sum(axis=-1) / rows[..., 1].sum(axis=-1))


def bits(rows: np.ndarray) -> np.ndarray:
    """Bits a byte of the same."""
    return -rows[..., 0].sum(axis=-1) / rows[..., 1].sum(axis=-1) / math.log(2)


def weighted_figure(metric: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes the figure of documents' pairs (log-probability, weight)."""
    return bits if metric == "bits_per_byte" else perplexities


def document_error(rows: np.ndarray, metric: str) -> float:
    """The standard error of a figure of documents (documents, 2), over draws of them.

    A perplexity's is that of its logarithm, times the perplexity: draws of few words would blow up its own.
    """
    drawn = np.concatenate([bits(rows[some]) for some in draws(len(rows))])
    if metric == "bits_per_byte":
        return float(drawn.std(ddof=1))
    return float(drawn.std(ddof=1) * math.log(2) * perplexities(rows))


def mean_kl(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean KL(before || after) of the distributions over the choices of each question, in nats."""
    values = []
    for sample, other in zip(before, after, strict=True):
        log_p, log_q = choice_logprobs(sample), choice_logprobs(other)
        if log_p is None or log_q is None or len(log_p) != len(log_q):
            return None
        with np.errstate(invalid="ignore"):
            terms = np.exp(log_p) * (log_p - log_q)
        values.append(float(np.where(np.exp(log_p) > 0, terms, 0.0).sum()))
    return float(np.mean(values)) if values else None


def p_text(chance: float) -> str:
    """A probability as tables have it."""
    return f"< {_LEAST_SHOWN}" if chance < _LEAST_SHOWN else f"{chance:.3f}"


def compare_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[PairedFigure]:
    """What `evaluate` returned of two models, metric by metric: groups first, then tasks.

    `before` is the model to be compared with: the one before quantizing or tuning. Both must have answered the same
    questions. Raises DataError if they did not.
    """
    pairs = []
    groups = after.get("groups") or {}
    for name in [*reversed([*groups]), *(name for name in after["samples"] if name not in groups)]:
        ours, theirs = (_samples_of(name, results) for results in (after, before))
        if [_question(task, sample) for task, sample in ours] != [_question(task, sample) for task, sample in theirs]:
            raise DataError(f"{name} was not asked with the same questions of both models, so they cannot be compared")
        for metric, filtered in dict.fromkeys((m, sample["filter"]) for _, sample in ours for m in sample["metrics"]):
            chosen = [
                (task, old, new)
                for (task, old), (_, new) in zip(theirs, ours, strict=True)
                if new["filter"] == filtered and metric in new and metric in old
            ]
            pair = _pair(name, metric, filtered, chosen)
            if pair is not None and (name not in groups or _is_groups_own(pair, groups[name])):
                pairs.append(pair)
    return pairs


def _is_groups_own(pair: PairedFigure, group: Mapping[str, Any]) -> bool:
    """Whether the group's figure counts every question alike, as the pair does."""
    value = group.get(f"{pair.metric},{pair.filtered}")
    return isinstance(value, int | float) and math.isclose(value, pair.after, abs_tol=1e-9)


def _samples_of(name: str, results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The samples of a task, or of all tasks of a group, each with its task."""
    samples = results["samples"]
    tasks = [name] if name in samples else _tasks_of(name, results)
    return [(task, sample) for task in tasks for sample in samples.get(task, ())]


def _tasks_of(group: str, results: Mapping[str, Any]) -> list[str]:
    inside = results.get("group_subtasks", {}).get(group, ())
    return [task for name in inside for task in ([name] if name in results["samples"] else _tasks_of(name, results))]


def _question(task: str, sample: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return task, sample["doc_id"], sample["filter"], sample["doc_hash"]


def _pair(
    name: str, metric: str, filtered: str, chosen: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
) -> PairedFigure | None:
    """The figures of one metric; None for one that is no number, nor a pair of log-probability and weight."""
    values = [(old[metric], new[metric]) for _, old, new in chosen]
    weighted = all(_is_weighted(value) for both in values for value in both)
    if not weighted and not all(isinstance(value, int | float | np.number) for both in values for value in both):
        return None
    before, after = (np.array([both[side] for both in values], dtype=float) for side in (0, 1))
    figure = weighted_figure(metric) if weighted else lambda rows: rows.mean(axis=-1)
    pair = PairedFigure(
        name,
        metric,
        filtered,
        len(values),
        float(figure(before)),
        float(figure(after)),
        resampled(before, after, figure),
    )
    if weighted:
        return pair
    pair = replace(pair, kl=mean_kl([old for _, old, _ in chosen], [new for _, _, new in chosen]))
    if not np.isin([before, after], (0, 1)).all():
        return pair
    places = [(task, int(new["doc_id"])) for task, _, new in chosen]
    lost = tuple(place for place, is_lost in zip(places, before > after, strict=True) if is_lost)
    won = tuple(place for place, is_won in zip(places, after > before, strict=True) if is_won)
    return replace(
        pair,
        interval=difference_interval(len(values), len(lost), len(won)),
        lost=lost,
        won=won,
        chance=mcnemar(len(lost), len(won)),
        smallest=smallest_visible(len(values), len(lost) + len(won)),
    )


def _is_weighted(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2
