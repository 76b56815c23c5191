"""What models answer to the same questions: how many each gets right, and which of its source's answers flip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_mlx import evaluate
from phi3_mlx.evaluation.paired import compare_results

# Questions of each of lm-eval's tasks, without examples before them. MMLU is 57 tasks and BLiMP 67.
ASKED = {"mmlu": 1, "arc_easy": 60, "arc_challenge": 60, "blimp": 2}
_METRIC = "acc"


def answers(model: Any, tokenizer: Any, data: Path, asked: Mapping[str, int] = ASKED) -> dict[str, Any]:
    """What `evaluate` returns of each task; `data` has the questions."""
    return {
        task: evaluate(model, tokenizer, task, data=data, limit=limit, num_fewshot=0) for task, limit in asked.items()
    }


def flips(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each task how many `questions` both were asked, how many each got right, and how many were lost and won."""
    found = {}
    for task, results in after.items():
        pairs = compare_results(before[task], results)
        (pair,) = (pair for pair in pairs if (pair.task, pair.metric) == (task, _METRIC))
        assert pair.lost is not None
        assert pair.won is not None
        found[task] = {
            "questions": pair.questions,
            "right": round(pair.after * pair.questions),
            "source_right": round(pair.before * pair.questions),
            "lost": len(pair.lost),
            "won": len(pair.won),
        }
    return found
