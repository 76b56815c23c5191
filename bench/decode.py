"""Decode speed of 4-bit models: phi3-mlx and mlx-lm in turn, reading the same directory.

    python -m bench decode [--only CASE] [--layers N] [--tokens N] [--runs N]

Cases: layers of Phi-3-mini's shape with bfloat16 scales, as models are published, the same with float32 scales (not on
a GPU, if not asked for), as many layers of Phi-4-mini's and Phi-3-medium's shapes (keys and values of 8 and 10 heads),
with bfloat16 scales on a GPU and float32 scales on a CPU, and the bundled model. Weights but the bundled are random and
made on the spot (speed does not depend on them); both packages have the same arrays where their types agree. On MLX's
CPU backend phi3-mlx computes in float32 in every case, mlx-lm in the type of the scales. Time counts from the second
token: how much of its step is computed before the first one is told differs between the packages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import Generation, Sampling

from . import record
from .contenders import in_turn, rows_of
from .models import CASES, LAYERS, default_cases, loaded


def speed(answer: Iterator[Any]) -> float:
    """Tokens a second, from the second one's to the last's."""
    next(answer), next(answer)
    started = time.perf_counter()
    return sum(1 for _ in answer) / (time.perf_counter() - started)


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(CASES), help="Some cases (repeatable).")
@click.option("--layers", default=LAYERS, show_default=True, help="Phi-3-mini has 32.")
@click.option("--tokens", default=128 if record.on_gpu() else 8, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(only: tuple[str, ...], layers: int, tokens: int, runs: int) -> None:
    from mlx_lm.generate import generate_step

    prompt = list(range(100, 116))

    def ours(model: Any, count: int) -> float:
        return speed(iter(Generation(model, [prompt], max_tokens=count + 2, sampling=Sampling())))

    def theirs(model: Any, count: int) -> float:
        return speed(generate_step(mx.array(prompt), model, max_tokens=count + 2))

    rows: list[dict[str, Any]] = []
    for case in only or default_cases(CASES):
        count = tokens * 16 if case == "tiny" and not record.on_gpu() else tokens  # it is that much faster on a CPU
        with loaded(case, layers) as (model, other, name):
            contenders = {"phi3-mlx": partial(ours, model, count), "mlx-lm": partial(theirs, other, count)}
            rows += rows_of(case, name, in_turn(contenders, runs), tokens=count)
    record.write("decode", rows, "mlx", "mlx-lm")


if __name__ == "__main__":
    main()
