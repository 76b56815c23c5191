"""Fine-tuning speed and memory: phi3-mlx and mlx-lm in turn, same model, examples, rank, batch and sequence limit.

    python -m bench tune [--layers N] [--small] [--bits N] [--steps N] [--runs N]

Layers have Phi-3-mini's shape, with random weights (speed does not depend on them). Lengths are skewed as in chats:
log-normal, most short and a few long. Both learn the answers alone, the latter half of every example. Useful tokens are
those of the examples; padding is none. Each package chooses its batches and is counted by what was in them. The first
steps are not timed. mlx-lm runs by its own trainer, as `mlx_lm.lora --mask-prompt` calls it.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np

from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.tuning.events import Listener, StepReport
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.trainer import Trainer

from . import record
from .models import DTYPE, LAYERS, RANK, SMALL, make_checkpoint

LONGEST = 1024
_WARM = 2  # steps that are not timed


def make_examples(count: int, vocab: int) -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.8, 0.9, count)), 16, LONGEST).astype(int)
    made = []
    for n, length in enumerate(lengths):
        ids = rng.integers(10, vocab, length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 2, f"made:{n}"))
    return made


def ours(directory: Path, data: list[Example], batch: int, steps: int) -> dict[str, float]:
    model = read_model(directory)
    attach(model, find_targets(model.config), RANK, 2.0 * RANK)
    settings = Settings(data="-", output="-", batch_size=batch, steps=steps + _WARM, optimizer="adamw")
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_every": 10**6, "validate_every": 10**6}
        settings = Settings(**{**vars(settings), **options})
        trainer = Trainer(model, data, [], settings, Path(folder), {}, Listener(step=reports.append))
        mx.clear_cache()
        mx.reset_peak_memory()
        trainer.run()
    timed = reports[_WARM:]
    seconds = sum(report.seconds for report in timed)
    return {"tokens_per_second": sum(r.tokens for r in timed) / seconds, "peak_memory": mx.get_peak_memory()}


class _Chats:
    """What mlx-lm's datasets are to its trainer: a line's dictionary, and ids with where the answer begins."""

    def __init__(self, data: list[Example]):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"messages": i}

    def process(self, line: dict[str, Any]) -> tuple[list[int], int]:
        example = self._data[line["messages"]]
        return example.ids.tolist(), int(np.flatnonzero(example.trained)[0])


def theirs(directory: Path, data: list[Example], batch: int, steps: int) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlx.optimizers as optim
        from mlx_lm.tuner.datasets import CacheDataset
        from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(directory)
    model.freeze()
    names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": names})
    seen: list[tuple[float, int]] = []

    def counted(**options: Any) -> Iterator[Any]:
        for ids, spans in iterate_batches(**options):
            seen.append((time.perf_counter(), int(spans[:, 1].sum().item()) - len(spans)))
            yield ids, spans

    mx.clear_cache()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        iters = steps + _WARM
        arguments = TrainingArgs(
            batch_size=batch,
            iters=iters,
            steps_per_report=10**6,
            steps_per_save=10**6,
            max_seq_length=LONGEST,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        optimizer = optim.AdamW(learning_rate=2e-4)
        train(model, optimizer, CacheDataset(_Chats(data)), args=arguments, iterate_batches=counted)
        ended = time.perf_counter()
    timed = seen[_WARM : _WARM + steps]
    ended = seen[_WARM + steps][0] if len(seen) > _WARM + steps else ended
    return {
        "tokens_per_second": sum(tokens for _, tokens in timed) / (ended - timed[0][0]),
        "peak_memory": mx.get_peak_memory(),
    }


@click.command(help=__doc__)
@click.option("--layers", default=LAYERS, show_default=True, help="Phi-3-mini has 32.")
@click.option("--small", is_flag=True, help="The bundled model's widths, to try it out.")
@click.option("--bits", default=4 if record.on_gpu() else 0, show_default=True, help="Pack the base; 0: floats.")
@click.option("--batch", default=4, show_default=True)
@click.option("--steps", default=8, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(layers: int, small: bool, bits: int, batch: int, steps: int, runs: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        make_checkpoint(directory, layers, DTYPE, bits, **(SMALL if small else {}))
        vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
        data = make_examples(batch * (steps + _WARM) * 2, vocab)
        for _ in range(runs):
            for name, contender in {"phi3-mlx": ours, "mlx-lm": theirs}.items():
                for figure, value in contender(directory, data, batch, steps).items():
                    figures.setdefault(name, {}).setdefault(figure, []).append(value)
    rows: list[dict[str, Any]] = [
        {"package": name, **{key: record.spread(v) for key, v in own.items()}} for name, own in figures.items()
    ]
    middle = {row["package"]: (row["tokens_per_second"]["median"], row["peak_memory"]["median"]) for row in rows}
    for name, (speed, memory) in middle.items():
        click.echo(f"{name:9} {speed:9.1f} useful tok/s   peak {memory / 1e9:.2f} GB")
    speed, memory = (middle["phi3-mlx"][i] / middle["mlx-lm"][i] for i in (0, 1))
    click.echo(f"phi3-mlx / mlx-lm: speed {speed:.2f}, memory {memory:.2f}")
    facts = {"layers": layers, "small": small, "bits": bits, "batch": batch, "steps": steps, "rank": RANK}
    if not small:
        record.write("tune", rows, "mlx", "mlx-lm", **facts, speed=speed, memory=memory)


if __name__ == "__main__":
    main()
