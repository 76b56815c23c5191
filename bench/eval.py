"""Questions a second: lm-eval's harness with our model, with mlx-lm's, and with transformers (its `hf` backend).

    python -m bench eval [--model DIR] [--data DIR] [--questions N] [--subjects N] [--only LIST]

All three hold the same float32 weights and are asked the same requests, in turn: MMLU with five examples before each
question, MMLU without, and ARC, whose choices are texts. `--model` is an unpacked directory or a GGUF file of `phi3` or
Llama's architecture (default: random weights of two layers with the bundled model's tokenizer), `--data` has MMLU's CSV
files and ARC's lines (default: questions made of the bundled text, of MMLU's mean length). What counts are the
questions of which all choices are scored. The run fails if a sum differs from transformers' by more than 0.0001 a
token; for mlx-lm the difference is told. `--batch`: rows of the `hf` backend; 1 for a LongRoPE model. PyTorch has a
process of its own, where its products are its own as well.

What is gained is mostly what is not read twice, so it grows with the questions of a subject: mlx-lm reads the examples
for each of them. MMLU has 100 or more a subject. `shared` is how many tokens the prompts have for each one that is
not the beginning of another prompt: no reader gains much more than that. `--subjects` are spread over all 57.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from phi3_mlx import HarnessLM, convert, load
from phi3_mlx.engine.prefill import common_length

from . import record
from .contenders import apart
from .models import copy_tokenizer, make_checkpoint, text_of

# The bundled tokenizer's ids; transformers takes 32,000 for the padding if it is not told.
SHAPE = {
    "vocab_size": 4032,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
LISTS = {"mmlu-5": ("mmlu", 5), "mmlu-0": ("mmlu", 0), "arc": ("arc_easy", 0)}  # lm-eval's task, examples
SUBJECTS = ("anatomy", "astronomy", "marketing", "nutrition", "virology")  # in lm-eval's order
QUESTION = 130  # tokens, with its choices: MMLU's mean
SAME = 1e-4  # of a token
BASE = "mlx-lm"

Timed = tuple[list[tuple[float, bool]], float, float]  # scores, seconds, seconds of the processor


def make_data(directory: Path, tokenizer: Any, questions: int) -> None:
    """MMLU's files and ARC's lines, made of the bundled text; nobody knows the answers."""
    text = tokenizer.encode(text_of(tokenizer, 20_000))

    def piece(number: int, tokens: int) -> str:
        first = number * 97 % (len(text) - tokens)
        return " ".join(str(tokenizer.decode(text[first : first + tokens])).split())

    for split, count in (("dev", 5), ("test", questions)):
        (directory / "mmlu" / split).mkdir(parents=True)
        for at, subject in enumerate(SUBJECTS):
            rows = [
                [piece(100 * at + 10 * n, QUESTION - 50), *(piece(7 * n + i, 10) for i in range(4)), "ABCD"[n % 4]]
                for n in range(count)
            ]
            with open(directory / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    lines = [
        {"question": piece(31 * n, 20), "choices": [piece(3 * n + i, 5) for i in range(4)], "answer": n % 4}
        for n in range(questions * len(SUBJECTS))
    ]
    (directory / "arc_easy_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def requests_of(name: str, shots: int, data: Path, subjects: int, questions: int) -> list[Any]:
    """What the harness asks for the first questions of some subjects, or of as many of a task without subjects."""
    from phi3_mlx.evaluation.tasks import harness_tasks

    (made,) = harness_tasks([name], data=data, num_fewshot=shots)
    asked = []
    tasks = [made]
    if name == "mmlu":  # those of one field, whose prompts may be short, have names that begin alike
        every = made.get_all_tasks()
        tasks = [every[number * len(every) // subjects] for number in range(min(subjects, len(every)))]
    for task in tasks:
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=questions if name == "mmlu" else questions * subjects)
        asked += task.instances
    return asked


def contenders(directory: Path) -> dict[str, Any]:
    """Each MLX package's language model for the harness, with the weights of a directory in float32."""
    from mlx_lm.evaluate import MLXLM

    return {"phi3-mlx": HarnessLM(*load(str(directory))), BASE: MLXLM(str(directory), use_chat_template=False)}


def reference(directory: Path, batch: int, asked: list[Any]) -> Timed:
    """What transformers' model gives, for which it needs a process of its own."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return timed(HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=batch, device="cpu"), asked)


def timed(model: Any, asked: list[Any]) -> Timed:
    """What the harness's language model gives, its seconds, and those of the processor; two questions warm it up."""
    model.loglikelihood(asked[:2])
    wall, processor = time.perf_counter(), time.process_time()
    results = model.loglikelihood(asked)
    return results, time.perf_counter() - wall, time.process_time() - processor


def shared(asked: Sequence[Any], encode: Callable[[str], list[int]]) -> float:
    """Tokens of the prompts, over those that are left when what begins alike counts once."""
    prompts = sorted(encode(text) for text in {request.args[0] for request in asked})
    alike = sum(common_length(*pair) for pair in pairwise(prompts))
    tokens = sum(map(len, prompts))
    return tokens / (tokens - alike)


def best_of(asked: Sequence[Any], results: Sequence[tuple[float, bool]]) -> dict[tuple[str, int], int]:
    """The likeliest choice of each question."""
    sums: dict[tuple[str, int], list[float]] = {}
    for request, (total, _) in zip(asked, results, strict=True):
        sums.setdefault((request.task_name, request.doc_id), []).append(total)
    return {question: totals.index(max(totals)) for question, totals in sums.items()}


def compared(asked: Sequence[Any], measured: dict[str, Timed], count: Callable[[str], int]) -> list[dict[str, Any]]:
    """A row for each package. ClickException if a score of ours is not transformers'."""
    expected = measured["transformers"][0]
    tokens = [count(request.args[1]) for request in asked]
    best = best_of(asked, expected)
    rows = []
    for name, (results, seconds, processor) in measured.items():
        differences = [
            abs(mine[0] - other[0]) / length for mine, other, length in zip(results, expected, tokens, strict=True)
        ]
        worst = max(differences)
        if name == "phi3-mlx" and not worst < SAME:
            raise click.ClickException(f"a score differs from transformers' by {worst:.1e} a token")
        same = sum(choice == best[question] for question, choice in best_of(asked, results).items())
        ratio = measured[BASE][1] / seconds
        click.echo(
            f"  {name:14}{len(best) / seconds:9.2f} questions/s  {ratio:6.2f}x  processor {processor:8.1f} s  "
            f"difference {worst:.1e} a token, {same} of {len(best)} choices the same"
        )
        rows.append(
            {
                "package": name,
                "questions": len(best),
                "questions_per_second": len(best) / seconds,
                "processor_seconds": processor,
                "ratio": ratio,
                "difference_a_token": worst if math.isfinite(worst) else None,
                "same_choices": same,
            }
        )
    return rows


@click.command(help=__doc__)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="An unpacked directory, or a GGUF file.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="MMLU's and ARC's questions.")
@click.option("--questions", type=click.IntRange(min=1), default=10, show_default=True, help="Of each subject.")
@click.option("--subjects", type=click.IntRange(min=1, max=57), default=5, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of the hf backend.")
@click.option("--only", type=click.Choice([*LISTS]), multiple=True, help="This list; may be given again.")
def main(
    model: Path | None, data: Path | None, questions: int, subjects: int, batch: int, only: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory, name = made / "model", "random weights" if model is None else model.stem
        if model is None:
            make_checkpoint(directory, 2, "float32", 0, **SHAPE)
            copy_tokenizer(directory)
        else:
            convert(model, directory, dequantize=True, dtype="float32", report=False)
        models = contenders(directory)
        tokenizer = load(str(directory))[1]
        if data is None:
            data = made / "data"
            make_data(data, tokenizer, questions)
        rows = []
        for case in only or LISTS:
            task, shots = LISTS[case]
            asked = requests_of(task, shots, data, subjects, questions)
            most = shared(asked, tokenizer.encode)
            click.echo(f"{task}, {shots} examples, {len(asked)} choices, {most:.2f} tokens for one that differs")
            measured = {package: timed(lm, asked) for package, lm in models.items()}
            measured["transformers"] = apart(reference, directory, batch, asked)
            rows += [
                {"case": case, "shots": shots, "shared": most, **row}
                for row in compared(asked, measured, lambda t: len(tokenizer.encode(t)))
            ]
    packages = ("mlx", "mlx-lm", "lm_eval", "torch", "transformers")
    record.write("eval", rows, *packages, model=name, batch=batch, made_questions=data.parent == made)


if __name__ == "__main__":
    main()
