"""Peak memory of reading a long prompt in chunks, phi3-mlx and mlx-lm with the same packed cache, in turn.

    python -m bench.longcontext [--tokens N] [--chunk N] [--layers N] [--bits B]

Heads are Phi-3-mini's (32 of 96); the feed-forward and the vocabulary are small and the weights random, since neither
adds to what grows with the length. Memory is MLX's own peak, less the weights. Beside it stands what `phi3-mlx plan`
foretells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import mlx.core as mx

from phi3_mlx.config import parse_config
from phi3_mlx.memory import Run
from phi3_mlx.models import build
from phi3_mlx.models.attention import fused_attention
from phi3_mlx.models.cache import KVBits

from . import record

GROUP_SIZE = 32


def make_config(layers: int, tokens: int) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "vocab_size": 512,
        "hidden_size": 3072,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": max(tokens, 4096),
        "original_max_position_embeddings": max(tokens, 4096),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }


def read_prompt(read: Callable[[mx.array], None], tokens: int, chunk: int) -> list[tuple[int, int, float]]:
    """(tokens read, peak bytes so far, seconds) at a quarter, a half and the whole of the prompt."""
    ids = mx.random.randint(0, 500, (1, tokens))
    mx.eval(ids)
    mx.clear_cache()
    base, started, seen = mx.get_active_memory(), time.perf_counter(), []
    mx.reset_peak_memory()
    for first in range(0, tokens, chunk):
        read(ids[:, first : first + chunk])
        mx.clear_cache()
        done = min(first + chunk, tokens)
        if done in (tokens // 4, tokens // 2, tokens):
            seen.append((done, mx.get_peak_memory() - base, time.perf_counter() - started))
    return seen


@click.command(help=__doc__)
@click.option("--tokens", default=32768, show_default=True)
@click.option("--chunk", default=512, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--alone", is_flag=True, help="Without mlx-lm.")
def main(tokens: int, chunk: int, layers: int, bits: int, alone: bool) -> None:
    raw = make_config(layers, tokens)
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16
    packing = KVBits(bits, bits, GROUP_SIZE)

    def ours() -> list[tuple[int, int, float]]:
        model = build(parse_config(raw))
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        cache = model.make_cache(bits=packing)

        def read(ids: mx.array) -> None:
            mx.eval(model.model(ids, cache), [layer.state for layer in cache])

        return read_prompt(read, tokens, chunk)

    def theirs() -> list[tuple[int, int, float]]:
        from mlx_lm.models import phi3
        from mlx_lm.models.cache import QuantizedKVCache

        model = phi3.Model(phi3.ModelArgs.from_dict(raw))
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        cache = [QuantizedKVCache(group_size=GROUP_SIZE, bits=bits) for _ in range(layers)]

        def read(ids: mx.array) -> None:
            mx.eval(model.model(ids, cache), [layer.state for layer in cache])

        return read_prompt(read, tokens, chunk)

    config = parse_config(raw)
    rows: list[dict[str, Any]] = []
    for name, contender in {"phi3-mlx": ours, "mlx-lm": theirs}.items():
        if alone and name == "mlx-lm":
            continue
        for done, peak, seconds in contender():
            run = Run(config, 0, done, bits=packing, itemsize=dtype.size, fused=fused_attention())
            row = {"package": name, "tokens": done, "peak": peak, "seconds": seconds}
            if name == "phi3-mlx":
                row |= {"cache": run.cache_bytes(), "planned": run.cache_bytes() + run.workspace(chunk)}
            rows.append(row)
            click.echo(f"{name:9} {done:7,} tokens  peak {peak / 1e6:9,.1f} MB  {seconds:7.1f} s")
    mine = [row for row in rows if row["package"] == "phi3-mlx"]
    grown = (mine[-1]["peak"] - mine[-2]["peak"]) / (mine[-1]["tokens"] - mine[-2]["tokens"])
    own = (mine[-1]["cache"] - mine[-2]["cache"]) / (mine[-1]["tokens"] - mine[-2]["tokens"])
    facts: dict[str, Any] = {"slope": grown, "cache_slope": own, "planned": mine[-1]["planned"] / mine[-1]["peak"]}
    click.echo(
        f"each further token: {grown:,.0f} bytes, of the cache itself {own:,.0f}; plan / peak {facts['planned']:.2f}"
    )
    if not alone:
        facts["ratio"] = mine[-1]["peak"] / rows[-1]["peak"]
        click.echo(f"peak, phi3-mlx / mlx-lm: {facts['ratio']:.2f}")
    record.write(
        record.RESULTS / "longcontext.json", rows, "mlx", "mlx-lm", chunk=chunk, layers=layers, bits=bits, **facts
    )


if __name__ == "__main__":
    main()
