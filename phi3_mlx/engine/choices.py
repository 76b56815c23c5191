"""An answer that is one of some given ones: the likeliest as a whole, and not token by token."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import mlx.core as mx
import numpy as np

from ..models.cache import KVCache, fork
from ..models.decoder import Model
from .scores import Scores


class LikeliestChoice:
    """A matcher of the likeliest of some lists of ids and a stop id behind it, once `decide` has found it."""

    def __init__(self, choices: Sequence[Sequence[int]], stop_ids: Collection[int], vocab_size: int):
        self._choices, self._vocab_size = choices, vocab_size
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self._ids: list[int] | None = None

    def decide(self, model: Model, cache: Sequence[KVCache], prompt: Sequence[int], chunk: int) -> None:
        """Let the answer be the choice with the largest sum of log-probabilities; the first of those that have it.

        `cache` has read the prompt, and stays as it is. `chunk`: tokens read at once.
        """
        if self._ids is None:
            totals = totals_of(model, cache, prompt, self._choices, chunk)
            self._ids = [*self._choices[totals.index(max(totals))]]

    def allowed(self, answer: Sequence[int]) -> np.ndarray:
        assert self._ids is not None
        mask = np.zeros(self._vocab_size, dtype=np.uint8)
        mask[self._ids[len(answer)] if len(answer) < len(self._ids) else self._stop_ids] = 1
        return mask

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        return [] if self._ids is None else self._ids[len(answer) :][:most]


def totals_of(
    model: Model, cache: Sequence[KVCache], prompt: Sequence[int], choices: Sequence[Sequence[int]], chunk: int
) -> list[float]:
    """The log-probability of each list of ids behind `prompt`, which `cache` has read.

    As if prompt and ids were one sequence, in LongRoPE's regime of its length. Those that differ in the last id alone
    are read once.
    """
    ends: dict[tuple[int, ...], list[int]] = {}
    for place, ids in enumerate(choices):
        ends.setdefault((*ids[:-1],), []).append(place)
    totals = [0.0] * len(choices)
    for stem, places in ends.items():
        logprobs = _logprobs(model, cache, prompt, stem, [choices[place][-1] for place in places], chunk)
        for place, last in zip(places, logprobs[len(stem) :], strict=True):
            totals[place] = math.fsum([*logprobs[: len(stem)], last])
    return totals


def _logprobs(
    model: Model, cache: Sequence[KVCache], prompt: Sequence[int], stem: Sequence[int], lasts: Sequence[int], chunk: int
) -> list[float]:
    """Of each id of the stem, and of each of those that may follow it."""
    branch, first = fork(cache), len(prompt) - 1
    for layer in branch:
        layer.trim(1)  # the logits behind the prompt's last token may depend on the length of the whole
    branch[0].sequence.prompt_length = (len(prompt) + len(stem) + 1,)
    branch[0].sequence.wanted_from = first
    ids, targets = [prompt[-1], *stem], [*([token] for token in stem), lasts]
    logprobs = []
    for begin in range(0, len(ids), chunk):
        hidden = model.model(mx.array([ids[begin : begin + chunk]]), branch)[0]
        places = list(range(len(hidden)))
        scores = Scores(model, hidden, targets[begin : begin + chunk], places=places)
        logprobs += [score.logprob for score in scores.told()]
    return logprobs
