"""Decode speed of 4-bit models: phi3-mlx and mlx-lm in turn, reading the same directory.

    python -m bench decode [--only CASE] [--layers N] [--tokens N] [--runs N]

Cases: layers of Phi-3-mini's shape with bfloat16 scales, as models are published, the same with float32 scales (not on
a GPU, if not asked for), as many layers of Phi-4-mini's and Phi-3-medium's shapes (keys and values of 8 and 10 heads),
with bfloat16 scales on a GPU and float32 scales on a CPU, and the bundled model. Weights but the bundled are random and
made on the spot (speed does not depend on them); both packages have the same arrays where their types agree. On MLX's
CPU backend phi3-mlx computes in float32 in every case, mlx-lm in the type of the scales.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi3_mlx.engine.batch import Generation
from phi3_mlx.engine.machine import room
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.models import build, parse_config
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.hub import resolve
from phi3_mlx.store.quantization import DEFAULTS

from . import record

# Phi-3-mini-4k; without its window, which mlx-lm does not have and which these lengths do not reach.
PHI_3_MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# What differs, of others of the family.
OTHERS: dict[str, dict[str, Any]] = {
    "Phi-4-mini": {
        "vocab_size": 200064,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "Phi-3-medium": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
    },
}
CASES = ("bfloat16", "float32", *OTHERS, "tiny")
# By default; of the unpacked weights two models must fit.
LAYERS = 2 if not record.on_gpu() else 32 if room() > 40e9 else 8
DTYPE = "bfloat16" if record.on_gpu() else "float32"  # that a model is computed in, if it is not said


def default_cases(cases: tuple[str, ...]) -> list[str]:
    """Those that are measured if none is asked for: nobody gives a GPU float32 scales."""
    return [case for case in cases if not (case == "float32" and record.on_gpu())]


def make_checkpoint(directory: Path, layers: int, dtype: str, bits: int, **shape: Any) -> None:
    """Random weights of Phi-3-mini's shape but for `shape`; with `bits` 0 they stay numbers of `dtype`."""
    config = {**PHI_3_MINI, **shape, "num_hidden_layers": layers, "torch_dtype": dtype}
    model = build(parse_config(config))
    model.set_dtype(getattr(mx, dtype))
    if bits:
        config["quantization"] = {"group_size": DEFAULTS["affine"][0], "bits": bits}
        nn.quantize(model, **config["quantization"])
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one after another: in floats all of them together may not fit
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))


@contextmanager
def loaded(case: str, layers: int) -> Iterator[tuple[Any, Any, str]]:
    """A case's model as phi3-mlx and as mlx-lm load it, and its name. "unpacked" is `DTYPE` that was not packed."""
    from mlx_lm.utils import load_model as load_mlx_lm

    with tempfile.TemporaryDirectory() as folder:
        directory = resolve("tiny") if case == "tiny" else Path(folder, "model")
        name = "the bundled model"
        if case != "tiny":
            packed, dtype = case != "unpacked", case if case in ("bfloat16", "float32") else DTYPE
            make_checkpoint(directory, layers, dtype, 4 if packed else 0, **OTHERS.get(case, {}))
            kind = f"4-bit, {dtype} scales" if packed else dtype
            shape = case if case in OTHERS else "Phi-3-mini"
            name = f"{kind}, {layers} {'layer' if layers == 1 else 'layers'} of {shape}'s shape"
        ours, theirs = read_model(directory), load_mlx_lm(directory)[0]
        mx.eval(ours.parameters(), theirs.parameters())
        kinds = [{key: (a.shape, a.dtype) for key, a in tree_flatten(m.parameters())} for m in (ours, theirs)]
        if kinds[0] == kinds[1]:
            theirs.update(ours.parameters())  # of two copies either may lie better: the same step took 1.5 % more
        yield ours, theirs, name


def in_turn(contenders: Mapping[str, Callable[[], float]], runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Each contender's tokens a second, and its peak of MLX's memory less what was held before (the weights).

    Measured alternately; a first round warms up.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, contender in contenders.items():
            gc.collect()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            figure = contender()
            if run:
                figures[name].append(figure)
                peaks[name].append(mx.get_peak_memory() - held)
    return {
        name: {"tokens_per_second": record.spread(figures[name]), "peak_memory": record.spread(peaks[name])}
        for name in contenders
    }


def rows_of(
    case: str, name: str, figures: dict[str, dict[str, dict[str, float]]], base: str = "mlx-lm", **facts: Any
) -> list[dict[str, Any]]:
    """A case's rows, one a contender, each with its speed over that of `base`."""
    click.echo(name)
    rows = []
    for package, measured in figures.items():
        figure, peak = measured["tokens_per_second"], measured["peak_memory"]["median"]
        ratio = figure["median"] / figures[base]["tokens_per_second"]["median"]
        ends = f"({figure['min']:.2f} to {figure['max']:.2f})"
        click.echo(f"  {package:22} {figure['median']:9.2f} tok/s   {ends}   {ratio:.2f}x   peak {peak / 1e6:,.1f} MB")
        rows.append({"case": case, "model": name, "package": package, **measured, "ratio": ratio, **facts})
    return rows


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(CASES), help="Some cases (repeatable).")
@click.option("--layers", default=LAYERS, show_default=True, help="Phi-3-mini has 32.")
@click.option("--tokens", default=128 if record.on_gpu() else 8, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(only: tuple[str, ...], layers: int, tokens: int, runs: int) -> None:
    from mlx_lm.generate import generate_step

    prompt = list(range(100, 116))

    def ours(model: Any, count: int) -> float:
        generation = Generation(model, [prompt], max_tokens=count + 1, sampling=Sampling())
        for _ in generation:
            pass
        return generation.statistics.decode_tps

    def theirs(model: Any, count: int) -> float:
        started = 0.0
        for i, _ in enumerate(generate_step(mx.array(prompt), model, max_tokens=count + 1)):
            if i == 0:
                started = time.perf_counter()
        return count / (time.perf_counter() - started)

    rows: list[dict[str, Any]] = []
    for case in only or default_cases(CASES):
        count = tokens * 16 if case == "tiny" and not record.on_gpu() else tokens  # it is that much faster on a CPU
        with loaded(case, layers) as (model, other, name):
            contenders = {"phi3-mlx": partial(ours, model, count), "mlx-lm": partial(theirs, other, count)}
            rows += rows_of(case, name, in_turn(contenders, runs), tokens=count)
    record.write("decode", rows, "mlx", "mlx-lm")


if __name__ == "__main__":
    main()
