"""Attention of one block-sparse layer of Phi-3-small, beside the same with a dense mask and plain causal attention.

    python -m bench blocksparse [--tokens N]... [--linear N]... [--chunk N] [--runs N]

Shapes are the model's: 32 heads of 128, 8 kv heads, blocks of 64, 16 local ones, every 8th vertical. A cache holds
random keys and values; `prefill` is the last chunk of a prompt of this many tokens, `decode` one token after it. *Dense
masked* is MLX's attention with the boolean mask of every head, made once and not timed, which gives the same numbers;
*causal* is MLX's own without a mask. Memory is MLX's peak beyond the cache; the mask counts to the dense one's.
`--linear` measures block-sparse attention alone, at lengths where a mask would not fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import mlx.core as mx

from phi3_mlx.config import BlockPattern
from phi3_mlx.models import blocksparse
from phi3_mlx.models.attention import fetched, fused_attention, make_mask
from phi3_mlx.models.cache import KVCache

from . import record

HEADS, KV_HEADS, DIM = 32, 8, 128
PATTERN = BlockPattern(block_size=64, local_blocks=16, stride=8, head_step=1)
SCALE = 1 / DIM


def dense_mask(queries: int, tokens: int) -> mx.array:
    """(1, heads, queries, tokens), of the last queries."""
    rows, keys = mx.arange(tokens - queries, tokens)[:, None], mx.arange(tokens)
    blocks, own = keys // PATTERN.block_size, rows // PATTERN.block_size
    residues = mx.array([PATTERN.residue(head) for head in range(HEADS)])[:, None, None]
    return ((keys <= rows) & ((own - blocks < PATTERN.local_blocks) | (blocks % PATTERN.stride == residues)))[None]


def attentions(queries: int, tokens: int, dense: bool) -> dict[str, Callable[[], mx.array]]:
    """The contenders: each computes attention of the last `queries` of `tokens`."""
    dtype = mx.bfloat16 if fused_attention() else mx.float32
    q = mx.random.normal((1, HEADS, queries, DIM), dtype, key=mx.random.key(0))
    k, v = (mx.random.normal((1, KV_HEADS, tokens, DIM), dtype, key=mx.random.key(n)) for n in (1, 2))
    cache = KVCache()
    cache.update_and_fetch(k, v)
    new_k, new_v = (mx.contiguous(array[:, :, tokens - queries :]) for array in (k, v))
    mx.eval(q, cache.state, new_k, new_v)
    del k, v  # a cache that shares its buffers with others is copied before it is written to

    def sparse() -> mx.array:
        cache.trim(queries)
        mask = make_mask(queries, None, cache)
        return blocksparse.attend_in_blocks(q, fetched(new_k, new_v, cache), cache, SCALE, mask, PATTERN)

    def masked() -> mx.array:
        seen = [array[:, :, :tokens] for array in cache.state]
        return mx.fast.scaled_dot_product_attention(q, *seen, scale=SCALE, mask=mask)

    def causal() -> mx.array:
        seen = [array[:, :, :tokens] for array in cache.state]
        return mx.fast.scaled_dot_product_attention(q, *seen, scale=SCALE, mask="causal" if queries > 1 else None)

    if not dense:
        return {"sparse": sparse}
    mask = dense_mask(queries, tokens)
    mx.eval(mask)
    expected = masked().transpose(0, 2, 1, 3).reshape(1, queries, -1)
    if not mx.allclose(sparse(), expected, rtol=1e-2, atol=1e-4 if dtype == mx.float32 else 1e-2):
        raise click.ClickException("sparse and dense masked attention differ")
    return {"sparse": sparse, "dense masked": masked, "causal": causal}


def measure(queries: int, tokens: int, runs: int, dense: bool) -> list[dict[str, Any]]:
    """A row for each contender, measured alternately; a first round warms up."""
    contenders = attentions(queries, tokens, dense)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for run in range(runs + 1):
        for name, attention in contenders.items():
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            started = time.perf_counter()
            mx.eval(attention())
            if run:
                seconds[name].append(time.perf_counter() - started)
                peaks[name] = max(peaks[name], mx.get_peak_memory() - before)
    if dense:
        peaks["dense masked"] += HEADS * queries * tokens
    rows = []
    for name, times in seconds.items():
        spread = record.spread(times)
        row = {"queries": queries, "tokens": tokens, "attention": name, "seconds": spread, "peak": peaks[name]}
        mine = record.spread(seconds["sparse"])["median"]
        if name != "sparse":
            row |= {"times_slower": spread["median"] / mine, "sparse_peak_ratio": peaks["sparse"] / peaks[name]}
        rows.append(row)
        against = (
            "" if name == "sparse" else f"   {row['times_slower']:5.2f}x   {row['sparse_peak_ratio']:.2f} of its peak"
        )
        click.echo(
            f"{tokens:7,} tokens {queries:4} queries  {name:13} {1e3 * spread['median']:9.2f} ms"
            f"   {peaks[name] / 1e6:8.1f} MB{against}"
        )
    return rows


@click.command(help=__doc__)
@click.option("--tokens", multiple=True, type=int, default=(2048, 4096, 8192), show_default=True)
@click.option("--linear", multiple=True, type=int, default=(16384, 32768), show_default=True)
@click.option("--chunk", default=512, show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(tokens: tuple[int, ...], linear: tuple[int, ...], chunk: int, runs: int) -> None:
    rows: list[dict[str, Any]] = []
    for queries in (chunk, 1):
        for length in tokens:
            rows += measure(queries, length, runs, dense=True)
        for length in linear:
            rows += measure(queries, length, runs, dense=False)
    record.write("blocksparse", rows, "mlx", pattern=PATTERN.__dict__, tile=blocksparse.TILE)


if __name__ == "__main__":
    main()
