"""Decode speed of several prompts of different lengths: together, one by one, and together in mlx-lm.

    python -m bench batch [--only CASE] [--rows N] [--layers N] [--tokens N] [--runs N]

Cases are Phi-3-mini's shape without packing, where reading the weights takes most of a step, the same packed to 4 bits
with float32 scales, on a GPU with bfloat16 scales, and the bundled model. Together every prompt must give the tokens it
gives alone; on a CPU the run fails if one does not, and on a GPU, where several rows round differently from one,
the share that is alike is in the result. Time counts from the second step's tokens: how much of the second step is
computed before the first one's tokens are told differs between the packages.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import click

from phi3_mlx import Generation, Sampling

from . import record
from .contenders import alike, in_turn, rows_of
from .models import DTYPE, LAYERS, loaded

CASES = ("unpacked", DTYPE, "tiny")


def make_prompts(rows: int) -> list[list[int]]:
    return [[100 + (37 * row + 11 * i) % 3000 for i in range(3 + 4 * row)] for row in range(rows)]


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(CASES), help="Some cases (repeatable).")
@click.option("--rows", default=8, show_default=True)
@click.option("--layers", default=LAYERS, show_default=True, help="Phi-3-mini has 32.")
@click.option(
    "--tokens",
    default=64 if record.on_gpu() else 8,
    show_default=True,
    help="Of each row; on a CPU 8 times as many for tiny.",
)
@click.option("--runs", default=3, show_default=True)
def main(only: tuple[str, ...], rows: int, layers: int, tokens: int, runs: int) -> None:
    from mlx_lm.generate import BatchGenerator

    prompts = make_prompts(rows)

    def run(model: Any, some: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        """Their tokens, and the seconds from the second step's to the last's, as `theirs` are counted."""
        generation = Generation(model, some, max_tokens=count + 2, sampling=Sampling())
        said: list[list[int]] = [[] for _ in some]
        started = 0.0
        for token in generation:
            said[token.row].append(token.id)
            if not started and len(said[token.row]) == 2:
                started = time.perf_counter()
        return said, time.perf_counter() - started

    def together(model: Any, count: int) -> float:
        answers["together"], seconds = run(model, prompts, count)
        return rows * count / seconds

    def alone(model: Any, count: int) -> float:
        runs = [run(model, [prompt], count) for prompt in prompts]
        answers["alone"] = [said[0] for said, _ in runs]
        return rows * count / sum(seconds for _, seconds in runs)

    def theirs(model: Any, count: int) -> float:
        generator = BatchGenerator(model, prefill_batch_size=rows, completion_batch_size=rows)
        generator.insert(prompts, [count + 2] * rows)
        seen, started = 0, 0.0
        while responses := generator.next_generated():
            seen += len(responses)
            if not started and seen == 2 * rows:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
        generator.close()
        return (seen - 2 * rows) / seconds

    results: list[dict[str, Any]] = []
    for case in only or CASES:
        answers: dict[str, list[list[int]]] = {}
        count = tokens * 8 if case == "tiny" and not record.on_gpu() else tokens
        with loaded(case, layers) as (model, other, name):
            contenders = {
                "phi3-mlx": partial(together, model, count),
                "phi3-mlx, one by one": partial(alone, model, count),
                "mlx-lm": partial(theirs, other, count),
            }
            figures = in_turn(contenders, runs)
        same = alike(answers["together"], answers["alone"])
        if same < 1 and not record.on_gpu():
            raise click.ClickException(f"{name}: a prompt's tokens are not the same in a batch")
        results += rows_of(case, name, figures, base="phi3-mlx, one by one", tokens=count, rows=rows, alike=same)
    record.write("batch", results, "mlx", "mlx-lm")


if __name__ == "__main__":
    main()
