"""Which passages are good: what a model says of them, what editors said, and a filter that learns it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from phi3_mlx import batch_score, load

GOOD = "elementary"  # OneStop's level whose passages the filter is to like
RATER, TRUSTED = "tiny", 0.6  # the AUC from which on the rater's word counts
_FEATURES = 1 << 18
_RUBRIC = """\
{}

How simple and clear is this text for a child? Answer with a number from 1 to 5. 1 is hard and unclear. 5 is simple."""


class Filter:
    """Logistic regression on hashed words and pairs of words. `good` says of each text whether it is."""

    def __init__(self, texts: Sequence[str], good: Sequence[bool]):
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression

        self._features = HashingVectorizer(n_features=_FEATURES, ngram_range=(1, 2))
        self._classifier = LogisticRegression(C=10.0, max_iter=1000)
        self._classifier.fit(self._features.transform(texts), np.array(good))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """How good each text is, (texts,); only the order means something."""
        scores: np.ndarray = self._classifier.decision_function(self._features.transform(texts))
        return scores


def auc(good: Sequence[bool], scores: Sequence[float] | np.ndarray) -> float:
    """How often a good text has the higher score than another."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(good, scores))


def ratings(texts: Sequence[str], model: str = RATER) -> list[float]:
    """What a model thinks of each text, 1 to 5: the mean of the digits by their probabilities."""
    digits = ["1", "2", "3", "4", "5"]
    prompts = [([{"role": "user", "content": _RUBRIC.format(text)}], digits) for text in texts]
    rated = []
    for scores in batch_score(*load(model), prompts):
        probabilities = np.exp([score.total for score in scores])
        rated.append(float(probabilities @ np.arange(1, 6) / probabilities.sum()))
    return rated


def labels(
    labelled: Sequence[dict[str, str]], tested: Sequence[dict[str, str]], sample: int
) -> tuple[list[str], list[bool], dict[str, Any]]:
    """(texts, which of them are good, facts): by a model's ratings if it can tell the levels apart, else by the levels.

    The model is tried on `sample` of the passages of `tested`.
    """
    tried = random.Random(0).sample(list(tested), min(sample, len(tested)))
    rated = ratings([record["text"] for record in tried])
    facts: dict[str, Any] = {
        "rater": RATER,
        "rated": len(tried),
        "rater_auc": auc([record["level"] == GOOD for record in tried], rated),
    }
    texts = [record["text"] for record in labelled]
    if facts["rater_auc"] >= TRUSTED:
        said = ratings(texts)
        good = [rating > float(np.median(said)) for rating in said]
    else:
        good = [record["level"] == GOOD for record in labelled]
    facts["labels"] = "the rater's" if facts["rater_auc"] >= TRUSTED else "the editors'"
    return texts, good, facts
