"""Write the page's table of how long evaluations take on a Mac with 16 GB, from what others have measured on one.

python docs/_estimates.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent / "evaluation.md"
_PLACE = re.compile(r"(<!-- Written by docs/_estimates.py from here -->\n).*?(<!-- to here. -->\n)", re.DOTALL)

MODEL, MEMORY = "phi-3-mini-4k-4bit", 16 * 2**30
# Published: a Mac mini (M4, GPU of 10 cores, 16 GB), Llama 3.1 8B in llama.cpp's Q4_K_M, tokens a second of a prompt of
# 512 and of an answer. https://github.com/brand-o/normiebench/issues/3
MEASURED_PROMPT, MEASURED_ANSWER = 224.81, 20.87
MEASURED_BYTES = 4.92e9  # of that file: an answer's token reads all weights
MEASURED_WEIGHTS = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)  # of its layers: a prompt's work
TOGETHER, LONGEST = 8, 1024  # prompts at once, and the tokens of most of MMLU's


class Run(NamedTuple):
    """A task: questions, tokens that are read where what begins alike is read once, and tokens of answers.

    Counted with Phi-3's tokenizer over the tasks' own test files; GSM8K's answers are as long as the solutions in it.
    """

    task: str
    questions: int
    read: int
    answers: int


RUNS = (
    Run("`mmlu`, 5 examples", 14_042, 33_675 + 14_042 * 122, 0),
    Run("`mmlu`, 5 examples, each question read alone", 14_042, 14_042 * 803, 0),
    Run("`arc_challenge`, no examples", 1_172, 1_172 * (34 + 32), 0),
    Run("`gsm8k`, no examples, answers of 132 tokens", 1_319, 1_319 * 72, 1_319 * 132),
    Run("`gsm8k`, no examples, answers of 256 tokens", 1_319, 1_319 * 72, 1_319 * 256),
)


def speeds() -> tuple[float, float]:
    """Tokens a second of prompts and of one answer after the other, scaled from the published ones."""
    from phi3_mlx.engine.capacity import workload_named

    workload = workload_named(MODEL)
    config = workload.config
    weights = config.num_hidden_layers * sum(rows * columns for rows, columns in config.linears.values())
    return MEASURED_PROMPT * MEASURED_WEIGHTS / weights, MEASURED_ANSWER * MEASURED_BYTES / workload.weights


def seconds(run: Run) -> float:
    """How long a run takes."""
    prompt, answer = speeds()
    return run.read / prompt + run.answers / answer


def memory() -> tuple[int, int]:
    """Bytes that the plan has for prompts that are read together, and those that a Mac of 16 GB lets a run take."""
    from phi3_mlx.engine.capacity import workload_named
    from phi3_mlx.engine.machine import mac_working_set

    room = mac_working_set(MEMORY)
    return replace(workload_named(MODEL), rows=TOGETHER, length=LONGEST, scores=True).plan(room).total, room


def section() -> str:
    """The table, and what it was computed from."""
    from phi3_mlx.sizes import size_text

    prompt, answer = speeds()
    rows = ["| task | questions | tokens read | tokens answered | about |", "|---|--:|--:|--:|--:|"]
    rows += [
        f"| {run.task} | {run.questions:,} | {run.read:,} | {run.answers:,} | {_duration(seconds(run))} |"
        for run in RUNS
    ]
    needed, room = memory()
    return (
        "\n".join(rows)
        + f"\n\nMemory: {size_text(needed)} of the {size_text(room)} that such a Mac lets a run take, by the plan for "
        f"{TOGETHER} prompts of {LONGEST:,} tokens that are read together.\nSpeed: {prompt:.0f} tokens a second of "
        f"prompts, {answer:.0f} of one answer after the other; up to 16 are given together, so it should be less.\n"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def with_estimates(text: str) -> str:
    """The text of the page with the estimates of today."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{section()}\n{place[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(with_estimates(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
