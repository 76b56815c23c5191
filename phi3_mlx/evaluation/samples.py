"""What a line of samples says of a question: how likely its choices were, and what the model answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def choice_logprobs(sample: Mapping[str, Any]) -> np.ndarray | None:
    """The logarithm of each choice's share of the probability that all of them have; None of what has no choices."""
    resps = [resp[0] for resp in sample["resps"]]
    if "acc_mutual_info" in sample["metrics"]:  # each choice once more, without the question
        resps = resps[: len(resps) // 2]
    if len(resps) < 2 or not all(isinstance(resp, list | tuple) and len(resp) == 2 for resp in resps):
        return None
    sums = np.array([resp[0] for resp in resps], dtype=float)
    if not np.isfinite(sums).all():
        return None
    sums -= sums.max()
    return sums - np.log(np.exp(sums).sum())


def told(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The question, its choices with their log-probabilities, the model's answer, and whether that is right.

    The answer is the likeliest choice, or the text that was taken from what the model said. `right` is the task's first
    metric that is 0 or 1; where there is none the key is missing.
    """
    first = sample["arguments"][0]
    line: dict[str, Any] = {"question": first[0]} if len(first) > 1 else {}  # a text has no question
    log_p = choice_logprobs(sample)
    if log_p is not None:
        asked = sample["arguments"][: len(log_p)]
        different = 1 if len({arguments[1] for arguments in asked}) > 1 else 0  # WinoGrande's are in the question
        texts = [arguments[different] for arguments in asked]
        line["choices"] = [
            {"text": text, "logprob": resp[0][0]} for text, resp in zip(texts, sample["resps"], strict=False)
        ]
        line["confidence"] = float(np.exp(log_p.max()))
        line["answer"] = texts[int(log_p.argmax())]
    elif isinstance(sample["filtered_resps"][0], str):
        line["answer"] = sample["filtered_resps"][0]
    if (metric := right_metric(sample)) is not None:
        line["right"] = bool(sample[metric])
    return line


def right_metric(sample: Mapping[str, Any]) -> str | None:
    """The sample's first metric that says right or wrong."""
    return next((name for name in sample["metrics"] if sample[name] in (0, 1, True, False)), None)
