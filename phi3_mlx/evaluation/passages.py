"""A user's texts as a task: how well a model predicts them, by token, word and byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fields import kind_of
from .questions import Question, lines_of, text_of

TEXT_ENDINGS = (".txt", ".md")


def read_passages(path: Path) -> list[str] | None:
    """The texts of a file: all of a `.txt` or `.md`, or the `text` of each line of JSON; None of lines of questions.

    Raises DataError for a file without text.
    """
    if path.name.endswith(TEXT_ENDINGS):
        texts = [text_of(path)]
        if not texts[0].strip():
            raise DataError(f"{path} holds no text; name a file that does")
        return texts
    lines = [*lines_of(path)]
    if not lines or "text" not in lines[0][0] or "question" in lines[0][0]:
        return None
    for line, source in lines:
        text = line.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{source}: text is {kind_of(text)}; expected a text")
    return [line["text"] for line, _ in lines]


def passages_config(texts: Sequence[str], count_tokens: Callable[[str], int]) -> tuple[dict[str, Any], list[Question]]:
    """The task's definition for lm-eval, and its documents.

    Words are what white space parts, as in lm-eval's wikitext. `count_tokens`: how many tokens of a text are scored.
    """

    def figures(passage: Question, results: Sequence[float]) -> dict[str, tuple[float, int]]:
        (logprob,) = results
        text = passage["text"]
        size = len(text.encode())
        return {
            "word_perplexity": (logprob, len(re.split(r"\s+", text))),
            "byte_perplexity": (logprob, size),
            "bits_per_byte": (logprob, size),
            "token_perplexity": (logprob, count_tokens(text)),
        }

    aggregations = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
        "token_perplexity": "weighted_perplexity",
    }
    config = {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{ text }}",
        "process_results": figures,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in aggregations.items()
        ],
        "metadata": {"version": 1},
    }
    return config, [{"text": text} for text in texts]
