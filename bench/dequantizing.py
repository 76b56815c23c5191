"""From how many rows on dequantized weights are multiplied faster than quantized ones: `python -m bench.dequantizing`.

`phi3_mlx.models.linear.DEQUANTIZED_ROWS` comes from here. Every figure is the least of several runs, in seconds of the
processor, so that a busy machine changes little; OPENBLAS_NUM_THREADS=1 keeps threads from being counted together.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import click

import phi3_mlx  # noqa: F401  (puts a fast BLAS in MLX's place)

SHAPES = (512, 512), (3072, 3072), (8192, 3072)  # outputs, inputs
LARGE = (32064, 3072)  # the output layer of Phi-3-mini
BITS = 4, 8, 3
ROWS = 1, 2, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64


def least(function: Callable[[], object], runs: int) -> float:
    """Seconds that the processor takes for the fastest of some runs."""
    import mlx.core as mx

    seconds = []
    for _ in range(runs):
        started = time.process_time()
        mx.eval(function())
        seconds.append(time.process_time() - started)
    return min(seconds)


@click.command()
@click.option("--runs", type=int, default=5, show_default=True, help="Runs of which the fastest counts.")
@click.option("--large", is_flag=True, help="The output layer of Phi-3-mini alone, which takes minutes.")
@click.option("--rows", "counts", type=int, multiple=True, default=ROWS, show_default=True, help="May be repeated.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def main(runs: int, large: bool, counts: tuple[int, ...], dtype: str) -> None:
    """Milliseconds of a packed product and of a dequantized one, by rows; and from how many on the second is faster."""
    import mlx.core as mx

    from phi3_mlx.models.linear import dequantized_product

    for (outputs, inputs), bits in itertools.product([LARGE] if large else SHAPES, BITS):
        weight = mx.random.normal((outputs, inputs), getattr(mx, dtype), key=mx.random.key(0))
        packed = mx.quantize(weight, 32, bits)
        product = dequantized_product(*packed, group_size=32, bits=bits)
        mx.eval(packed)
        del weight
        cells, faster = [], None
        for rows in counts:
            x = mx.random.normal((rows, inputs), getattr(mx, dtype), key=mx.random.key(1))
            mx.eval(x)
            as_packed = least(lambda: mx.quantized_matmul(x, *packed, True, 32, bits), runs)  # noqa: B023
            dequantized = least(lambda: product(x), runs)  # noqa: B023
            faster = faster or (rows if dequantized < as_packed else None)
            cells.append(f"{rows}: {as_packed * 1e3:.1f}/{dequantized * 1e3:.1f}")
        click.echo(f"{outputs} x {inputs}, {bits} bits: from {faster} rows on; {'  '.join(cells)} ms")


if __name__ == "__main__":
    main()
