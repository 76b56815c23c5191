"""Attention of a decoding step for several rows: caches of their own, arrays shared by those of like length, padding.

    python -m bench slots [--rows N] [--layers N] [--steps N] [--runs N]

`own`: each row attends alone; `shared`: rows whose lengths differ by at most 256 tokens attend together, as this
package does; `padded`: all rows in one array, as long as the longest. Milliseconds of a step's attention in all layers,
of the clock and of the calling thread until it is queued, the least of `--runs` medians of `--steps` steps in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import mlx.core as mx

from phi3_mlx.models.attention import attend, fetched, fused_attention, make_mask
from phi3_mlx.models.cache import KVCache, SequenceState
from phi3_mlx.models.slots import SETTLED, units_of

from . import record

HEADS = {  # query heads, heads of keys, their width
    "4 heads, 2 of keys, 64 wide": (4, 2, 64),
    "Phi-4-mini's: 24 heads, 8 of keys, 128 wide": (24, 8, 128),
    "Phi-3-mini's: 32 heads, 32 of keys, 96 wide": (32, 32, 96),
}
LENGTHS = {  # shortest and longest row
    "100 to 240 tokens": (100, 240),
    "600 to 840 tokens": (600, 840),
    "100 to 2,000 tokens": (100, 2000),
}


def contenders_of(heads: tuple[int, int, int], lengths: Sequence[int], layers: int) -> dict[str, Callable[[], Any]]:
    """Each contender's attention of a further token of rows of these lengths."""
    queries, kv_heads, dim = heads
    dtype = mx.bfloat16 if fused_attention() else mx.float32
    rows, scale = len(lengths), dim**-0.5
    q, k, v = (mx.random.normal((rows, n, 1, dim), dtype) for n in (queries, kv_heads, kv_heads))

    def cache(tokens: int, sequence: SequenceState, count: int = 1) -> list[KVCache]:
        made = [KVCache(sequence) for _ in range(layers)]
        for layer in made:
            layer.update_and_fetch(*(mx.random.normal((count, kv_heads, tokens, dim), dtype) for _ in range(2)))
            mx.eval(layer.state)
        return made

    def settled() -> SequenceState:
        sequence = SequenceState()
        sequence.steps = SETTLED
        return sequence

    alone = [cache(length, SequenceState()) for length in lengths]
    alike = [cache(length, settled()) for length in lengths]
    padded = cache(max(lengths), SequenceState(left_padding=tuple(max(lengths) - n for n in lengths)), rows)

    def attended(caches: list[list[KVCache]]) -> list[mx.array]:
        units = units_of(caches, share=caches is alike)
        places = [mx.array([*unit.rows]) for unit in units]
        parts = [(q[place], k[place], v[place]) for place in places]
        return [
            attend(queries, fetched(keys, values, unit.layers[layer]), unit.layers[layer], scale, unit.mask)
            for layer in range(layers)
            for unit, (queries, keys, values) in zip(units, parts, strict=True)
        ]

    def in_one() -> list[mx.array]:
        mask = make_mask(1, None, padded[0])
        return [attend(q, fetched(k, v, layer), layer, scale, mask) for layer in padded]

    return {"own": lambda: attended(alone), "shared": lambda: attended(alike), "padded": in_one}


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds by the clock, and of the calling thread until the step is queued."""
    mx.synchronize()
    clock, began = time.perf_counter(), time.thread_time()
    out = step()
    mx.async_eval(out)
    queued = time.thread_time()
    mx.eval(out)
    return 1e3 * (time.perf_counter() - clock), 1e3 * (queued - began)


@click.command(help=__doc__)
@click.option("--rows", default=16, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--steps", default=5, show_default=True, help="In a run.")
@click.option("--runs", default=3, show_default=True)
def main(rows: int, layers: int, steps: int, runs: int) -> None:
    results: list[dict[str, Any]] = []
    for shape, heads in HEADS.items():
        for name, (shortest, longest) in LENGTHS.items():
            lengths = [shortest + (longest - shortest) * row // max(rows - 1, 1) for row in range(rows)]
            contenders = contenders_of(heads, lengths, layers)
            figures: dict[str, list[tuple[float, float]]] = {contender: [] for contender in contenders}
            for run in range(runs + 1):
                for contender, step in contenders.items():
                    measured = [timed(step) for _ in range(steps)]
                    if run:  # the first warms up
                        figures[contender].append(
                            tuple(statistics.median(some) for some in zip(*measured, strict=True))
                        )
            click.echo(f"{rows} rows of {name}, {shape}")
            for contender, some in figures.items():
                step_ms, host_ms = (min(column) for column in zip(*some, strict=True))
                click.echo(f"  {contender:8} {step_ms:8.2f} ms   host {host_ms:6.2f} ms")
                row = {"heads": shape, "lengths": name, "rows": rows, "contender": contender}
                results.append({**row, "milliseconds": step_ms, "host": host_ms})
    record.write("slots", results, "mlx", layers=layers)


if __name__ == "__main__":
    main()
