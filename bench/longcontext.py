"""Peak memory of reading a long prompt in chunks, phi3-mlx and mlx-lm with the same packed cache, in turn.

    python -m bench longcontext [--tokens N] [--chunk N] [--layers N] [--bits B] [--alone] [--last] [--once]
                                [--packed] [--full] [--mlx-lm-whole] [--name NAME]

Heads are Phi-3-mini's (32 of 96). The weights are random; the feed-forward and the vocabulary are small, since neither
adds to what grows with the length, and Phi-3-mini's own with `--full`. Memory is MLX's own peak, less the weights, of
prompts of a quarter, a half and all of the tokens. Beside it stands what `phi3-mlx plan` foretells.

phi3-mlx reads every token. mlx-lm's scores against a packed cache take hours on a CPU, so there the model reads the
first chunk and the last, those with the most to score; between them the cache is filled with random
keys and values, packed as they come. The peak is the same if the chunk is a multiple of 256, by which caches grow.
`--mlx-lm-whole` has it read every token; `--last` has phi3-mlx do as mlx-lm does. `--once` reads all tokens alone, no
shorter prompts before. `--packed` has the weights in 4 bits, so that more layers fit. As in both packages, the last
layer's output is computed for the last chunk only. results/longcontext.png shows the figures of all lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn

from phi3_mlx import KVBits
from phi3_mlx.engine.plan import Workload
from phi3_mlx.models import build, parse_config

from . import plots, record
from .models import DTYPE, LAYERS, PHI_3_MINI

GROUP_SIZE = 32
HEADS, HEAD_DIM = 32, 96
SMALL = {"vocab_size": 512, "intermediate_size": 256}
PACKING = {"group_size": 64, "bits": 4}  # of the weights
_FILL = 4096  # tokens at a time


def make_config(layers: int, tokens: int, packed: bool, full: bool) -> dict[str, Any]:
    context = max(tokens + 256, 4096)
    config = PHI_3_MINI | {
        "num_hidden_layers": layers,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": context,
        "original_max_position_embeddings": context,
    }
    return config | ({} if full else SMALL) | ({"quantization": PACKING} if packed else {})


def read_prompts(
    model: Any, make_cache: Callable[[int], list[Any]], lengths: list[int], chunk: int, whole: bool
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Of a prompt of each length: tokens, those read, peak bytes, seconds. And the cache of the last."""
    dtype = model.model.norm.weight.dtype
    ids = mx.random.randint(0, 500, (1, max(lengths)))
    mx.eval(ids)
    rows = []
    cache: list[Any] = []
    for length in lengths:
        cache.clear()
        mx.clear_cache()
        base, started, first, read, peak = mx.get_active_memory(), time.perf_counter(), 0, 0, 0
        cache = make_cache(length)
        while first < length:
            if whole or not first or first >= length - chunk:
                last = min(first + chunk, length)
                read += last - first
                mx.reset_peak_memory()
                hidden = model.model(ids[:, first:last], cache)
                mx.eval(state_of(cache), hidden if last == length else [])
                del hidden
                peak = max(peak, mx.get_peak_memory() - base)
            else:
                last = min(first + _FILL, length - chunk)
                for layer in cache:
                    shape = (1, HEADS, last - first, HEAD_DIM)
                    layer.update_and_fetch(mx.random.normal(shape, dtype), mx.random.normal(shape, dtype))
                    mx.eval(state_of([layer]))
                    mx.clear_cache()  # of many layers the cache takes most of the machine's memory
            mx.clear_cache()
            first = last
        seconds = time.perf_counter() - started
        rows.append({"tokens": length, "read": read, "peak": peak, "seconds": seconds})
        click.echo(f"{length:9,} tokens, {read:7,} read   peak {peak / 1e6:9,.1f} MB  {seconds:7.1f} s")
    return rows, cache


def state_of(cache: list[Any]) -> list[Any]:
    """The arrays of a cache of either package."""
    return [layer.state if hasattr(layer, "sequence") else (layer.keys, layer.values) for layer in cache]


def decode(logits: Callable[[mx.array], mx.array], cache: list[Any], steps: int, base: int) -> dict[str, float]:
    """Speed and peak of single tokens behind the prompt. `logits`: of a token (1, 1), which the cache takes in."""
    token = mx.array([[1]])
    mx.reset_peak_memory()
    started = time.perf_counter()
    for _ in range(steps):
        token = logits(token).argmax(-1)
        mx.eval(token, state_of(cache))
    seconds = time.perf_counter() - started
    return {"tokens": steps, "tokens_per_second": steps / seconds, "peak": mx.get_peak_memory() - base}


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the longest prompts' rows say together: plan by peak, bytes of each further token, peak by mlx-lm's."""
    ours = [row for row in rows if row["package"] == "phi3-mlx"]
    longest = ours[-1]
    ratios = {"planned": longest["planned"] / longest["peak"]}
    if len(ours) > 1:
        more = longest["tokens"] - ours[-2]["tokens"]
        ratios["slope"] = (longest["peak"] - ours[-2]["peak"]) / more
        ratios["cache_slope"] = (longest["cache"] - ours[-2]["cache"]) / more
        click.echo("each further token: {slope:,.0f} bytes, of the cache itself {cache_slope:,.0f}".format(**ratios))
    click.echo(f"plan / peak: {ratios['planned']:.2f}")
    if len(rows) > len(ours):
        ratios["ratio"] = longest["peak"] / rows[-1]["peak"]
        click.echo(f"peak, phi3-mlx / mlx-lm: {ratios['ratio']:.2f}")
    return ratios


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(min=4), default=131072 if record.on_gpu() else 32768, show_default=True)
@click.option("--chunk", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--decode", "steps", default=0, show_default=True, help="Tokens to decode behind the prompt.")
@click.option("--alone", is_flag=True, help="Without mlx-lm.")
@click.option("--last", is_flag=True, help="phi3-mlx too reads only those chunks.")
@click.option("--once", is_flag=True, help="The full length only.")
@click.option("--packed", is_flag=True, help="Weights in 4 bits.")
@click.option("--full", is_flag=True, help="Phi-3-mini's feed-forward and vocabulary too.")
@click.option(
    "--mlx-lm-whole/--mlx-lm-last", default=record.on_gpu(), show_default=True, help="mlx-lm too reads every token."
)
@click.option("--name", help="Of the result file, behind longcontext-.")
def main(
    tokens: int,
    chunk: int,
    layers: int,
    bits: int,
    steps: int,
    alone: bool,
    last: bool,
    once: bool,
    packed: bool,
    full: bool,
    mlx_lm_whole: bool,
    name: str | None,
) -> None:
    raw = make_config(layers, tokens, packed, full)
    lengths = [tokens] if once else [tokens // 4, tokens // 2, tokens]
    dtype = getattr(mx, DTYPE)
    packing = KVBits(bits, bits, GROUP_SIZE)
    facts: dict[str, Any] = {"chunk": chunk, "layers": layers, "bits": bits, "group_size": GROUP_SIZE, "full": full}

    def made(model: Any) -> Any:
        model.set_dtype(dtype)
        if packed:
            nn.quantize(model, **PACKING)
        mx.eval(model.parameters())
        return model

    def decoded(key: str, logits: Callable[[mx.array], mx.array], cache: list[Any], base: int) -> None:
        if steps:
            facts[key] = decode(logits, cache, steps, base)
            click.echo("then {tokens} more at {tokens_per_second:.2f} tok/s, peak {peak:,.0f}".format(**facts[key]))

    def ours() -> list[dict[str, Any]]:
        model = made(build(parse_config(raw)))
        base = mx.get_active_memory()
        rows, cache = read_prompts(
            model, lambda length: model.make_cache(length, bits=packing), lengths, chunk, whole=not last
        )
        decoded("decode", lambda token: model.logits(model.model(token, cache)), cache, base)
        for row in rows:
            workload = Workload.of_model(model, row["tokens"], kv_bits=packing)
            row |= {"cache": workload.cache_bytes(), "planned": workload.cache_bytes() + workload.workspace(chunk)}
        return rows

    def theirs() -> list[dict[str, Any]]:
        from mlx_lm.models import phi3
        from mlx_lm.models.cache import QuantizedKVCache

        model = made(phi3.Model(phi3.ModelArgs.from_dict(raw)))
        base = mx.get_active_memory()
        rows, cache = read_prompts(
            model,
            lambda _: [QuantizedKVCache(group_size=GROUP_SIZE, bits=bits) for _ in range(layers)],
            lengths,
            chunk,
            whole=mlx_lm_whole,
        )
        try:
            decoded("decode_mlx_lm", lambda token: model(token, cache), cache, base)
        except RuntimeError as error:  # MLX's packed products take no arrays that are cut, on CUDA
            facts["decode_mlx_lm"] = {"error": str(error)}
            click.echo(f"then mlx-lm fails: {error}")
        return rows

    rows: list[dict[str, Any]] = []
    for package, contender in {"phi3-mlx": ours, "mlx-lm": theirs}.items():
        if not (alone and package == "mlx-lm"):
            click.echo(package)
            rows += [{"package": package, **row} for row in contender()]
    facts |= ratios_of(rows)
    record.write(f"longcontext-{name}" if name else "longcontext", rows, "mlx", "mlx-lm", **facts)
    results = [result for other, result in record.read().items() if other.startswith("longcontext")]
    plots.peaks(
        [result for result in results if result["layers"] == results[0]["layers"]], record.RESULTS / "longcontext.png"
    )


if __name__ == "__main__":
    main()
