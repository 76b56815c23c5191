"""Decode speed of a 4-bit model with bfloat16 scales at Phi-3-mini's layer shape: phi3-mlx and mlx-lm in turn.

    python -m bench.decode [--layers N] [--tokens N] [--runs N]

The weights are random and made on the spot (speed does not depend on them); both read the same directory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
from mlx.utils import tree_flatten

from phi3_mlx.checkpoint import load_model
from phi3_mlx.config import parse_config
from phi3_mlx.conversion import convert
from phi3_mlx.engine import Generation
from phi3_mlx.models import build
from phi3_mlx.sampling import Sampling

from . import record

# Phi-3-mini-4k; without its window, which mlx-lm does not have and which 100 tokens do not reach.
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


def make_checkpoint(directory: Path, layers: int) -> None:
    config = {**PHI_3_MINI, "num_hidden_layers": layers}
    model = build(parse_config(config))
    model.set_dtype(mx.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        mx.save_safetensors(str(Path(folder, "model.safetensors")), dict(tree_flatten(model.parameters())))
        Path(folder, "config.json").write_text(json.dumps(config))
        convert(folder, directory, report=False)


@click.command(help=__doc__)
@click.option("--layers", default=4, show_default=True, help="Phi-3-mini has 32.")
@click.option("--tokens", default=16, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(layers: int, tokens: int, runs: int) -> None:
    prompt = list(range(100, 116))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        make_checkpoint(directory, layers)
        model = load_model(directory)
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model as load_mlx_lm

        other, _ = load_mlx_lm(directory)

        def ours() -> float:
            generation = Generation(model, [prompt], max_tokens=tokens + 1, sampling=Sampling())
            for _ in generation:
                pass
            return generation.statistics.decode_tps

        def theirs() -> float:
            started = 0.0
            for i, _ in enumerate(generate_step(mx.array(prompt), other, max_tokens=tokens + 1)):
                if i == 0:
                    started = time.perf_counter()
            return tokens / (time.perf_counter() - started)

        contenders: dict[str, Callable[[], float]] = {"phi3-mlx": ours, "mlx-lm": theirs}
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for run in range(runs + 1):
            for name, contender in contenders.items():
                speed = contender()
                if run:  # the first warms up
                    speeds[name].append(speed)
    figures = {name: record.spread(values) for name, values in speeds.items()}
    ratio = figures["phi3-mlx"]["median"] / figures["mlx-lm"]["median"]
    for name, figure in figures.items():
        click.echo(f"{name:9} {figure['median']:7.2f} tok/s   ({figure['min']:.2f} to {figure['max']:.2f})")
    click.echo(f"phi3-mlx / mlx-lm: {ratio:.1f}")
    rows = [{"package": name, "tokens_per_second": figure} for name, figure in figures.items()]
    record.write(record.RESULTS / "decode.json", rows, "mlx", "mlx-lm", layers=layers, tokens=tokens, ratio=ratio)


if __name__ == "__main__":
    main()
