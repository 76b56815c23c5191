"""What a step of decoding costs the host, beside mlx-lm, where the arithmetic is next to nothing.

    python -m bench host [--rows N ...] [--bits N ...] [--layers N] [--steps N] [--runs N]

Layers of a tiny width, as many as Phi-3-mini has, decode a token of each row. All rows are equally long: ours share
arrays of keys and values, mlx-lm's a batch. `build` is the time in which Python and MLX make the graph of a step, and
`host` adds that of `mx.async_eval`, both in processor time of the calling thread, which does not count waiting; `step`
is the whole, by the clock. Steps of the two packages alternate; a run's figure is the median of its steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from phi3_mlx.store.checkpoint import read_model

from . import record
from .models import DTYPE, make_checkpoint

WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = 16
Step = Callable[[mx.array], mx.array]  # ids (rows, 1) -> logits (rows, vocab_size)


def timed(step: Step, ids: mx.array) -> tuple[mx.array, dict[str, float]]:
    """The next ids, and the milliseconds of a step by figure."""
    mx.synchronize()
    clock, began = time.perf_counter(), time.thread_time()
    following = mx.argmax(step(ids), axis=-1, keepdims=True)
    built = time.thread_time()
    mx.async_eval(following)
    queued = time.thread_time()
    mx.eval(following)
    seconds = {"build": built - began, "host": queued - began, "step": time.perf_counter() - clock}
    return following, {name: 1e3 * value for name, value in seconds.items()}


def in_turn(contenders: Mapping[str, Step], rows: int, steps: int) -> dict[str, dict[str, float]]:
    """Each contender's figures, the median of steps that alternate with those of the others."""
    ids = dict.fromkeys(contenders, mx.array([[5]] * rows))
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(steps):
        for name, step in contenders.items():
            ids[name], figure = timed(step, ids[name])
            figures[name].append(figure)
    return {
        name: {key: statistics.median(figure[key] for figure in some) for key in some[0]}
        for name, some in figures.items()
    }


def contenders_of(ours: Any, theirs: Any, rows: int) -> dict[str, Step]:
    """A step of each package, behind a prompt of `PROMPT` tokens a row."""
    from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

    prompt = mx.arange(PROMPT)[None]
    caches = [ours.make_cache() for _ in range(rows)]
    batch = make_prompt_cache(theirs) if rows == 1 else [BatchKVCache([0] * rows) for _ in theirs.layers]
    mx.eval([ours(prompt, cache) for cache in caches], theirs(mx.repeat(prompt, rows, axis=0), cache=batch))

    def step(ids: mx.array) -> mx.array:
        if rows == 1:
            return ours.logits(ours.model(ids, caches[0])[0])
        return ours.logits(ours.model.together(ids.reshape(1, rows), [1] * rows, caches)[0])

    return {"phi3-mlx": step, "mlx-lm": lambda ids: theirs(ids, cache=batch)[:, -1]}


@click.command(help=__doc__)
@click.option("--rows", multiple=True, type=int, default=(1, 8, 16), show_default=True)
@click.option("--bits", multiple=True, type=int, default=(0, 4), show_default=True, help="Of the weights; 0: floats.")
@click.option("--layers", default=32, show_default=True, help="Phi-3-mini has 32.")
@click.option("--steps", default=20, show_default=True, help="In a run.")
@click.option("--runs", default=5, show_default=True)
def main(rows: tuple[int, ...], bits: tuple[int, ...], layers: int, steps: int, runs: int) -> None:
    from mlx_lm.utils import load_model

    results: list[dict[str, Any]] = []
    for width in bits:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, "model")
            make_checkpoint(directory, layers, DTYPE, width, vocab_size=256, **WIDTH)
            ours, theirs = read_model(directory), load_model(directory)[0]
            mx.eval(ours.parameters(), theirs.parameters())
        for count in rows:
            contenders = contenders_of(ours, theirs, count)
            measured = [in_turn(contenders, count, steps) for _ in range(runs + 1)][1:]  # the first warms up
            results += _rows(f"{width}-bit" if width else DTYPE, count, measured)
    record.write("host", results, "mlx", "mlx-lm", layers=layers)


def _rows(weights: str, rows: int, measured: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A case's rows, one a contender: milliseconds of each figure, and the median ratio to mlx-lm's of the same run."""
    click.echo(f"{weights} weights, {rows} row{'s' if rows > 1 else ''}")
    found = []
    for package in measured[0]:
        figures = {key: record.spread([run[package][key] for run in measured]) for key in measured[0][package]}
        ratios = {key: statistics.median(run[package][key] / run["mlx-lm"][key] for run in measured) for key in figures}
        texts = [f"{key} {figure['median']:6.2f} ms ({ratios[key]:.2f}x)" for key, figure in figures.items()]
        click.echo(f"  {package:10} {'   '.join(texts)}")
        found.append({"weights": weights, "rows": rows, "package": package, **figures, "ratios": ratios})
    return found


if __name__ == "__main__":
    main()
