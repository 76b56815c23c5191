"""Speed of reading a prompt with 4-bit models: phi3-mlx and mlx-lm in turn, reading the same directory.

    python -m bench prefill [--only CASE] [--layers N] [--tokens N] [--long N] [--runs N]

Cases are those of `decode`, and weights that are not packed. MLX's packed product takes as long on a CPU for each row
as for the first, so there mlx-lm's prompts are short where weights are packed: `--tokens`. phi3-mlx reads the same,
and, for the speed of a full chunk, `--long` tokens too.
Neither package computes the last layer's output where only its keys are needed, so one layer alone says little.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import Generation, Sampling

from . import record
from .contenders import in_turn, rows_of
from .models import CASES as PACKED
from .models import LAYERS, default_cases, loaded

CASES = ("unpacked", *PACKED)
_FAST = {} if record.on_gpu() else {"unpacked": 16, "tiny": 16}  # times as many tokens


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(CASES), help="Some cases (repeatable).")
@click.option("--layers", default=LAYERS, show_default=True, help="Phi-3-mini has 32.")
@click.option(
    "--tokens",
    default=2048 if record.on_gpu() else 32,
    show_default=True,
    help="Of the prompt; on a CPU 16 times as many for tiny and for unpacked.",
)
@click.option("--long", "many", default=0, show_default=True, help="Of another prompt, for phi3-mlx alone.")
@click.option("--runs", default=3, show_default=True)
def main(only: tuple[str, ...], layers: int, tokens: int, many: int, runs: int) -> None:
    from mlx_lm.generate import generate_step

    def ours(model: Any, count: int) -> float:
        generation = Generation(model, [prompt_of(count)], max_tokens=1, sampling=Sampling())
        for _ in generation:
            pass
        return generation.statistics.prompt_tps

    def theirs(model: Any, count: int) -> float:
        started = time.perf_counter()
        for _ in generate_step(mx.array(prompt_of(count)), model, max_tokens=1):
            pass
        return count / (time.perf_counter() - started)

    rows: list[dict[str, Any]] = []
    for case in only or default_cases(CASES):
        count = tokens * _FAST.get(case, 1)
        with loaded(case, layers) as (model, other, name):
            contenders = {"phi3-mlx": partial(ours, model, count), "mlx-lm": partial(theirs, other, count)}
            if many and case not in _FAST:
                contenders[f"phi3-mlx, {many:,} tokens"] = partial(ours, model, many)
            rows += rows_of(case, name, in_turn(contenders, runs), tokens=count)
    record.write("prefill", rows, "mlx", "mlx-lm")


def prompt_of(tokens: int) -> list[int]:
    return [100 + i % 3000 for i in range(tokens)]


if __name__ == "__main__":
    main()
