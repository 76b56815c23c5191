"""What fine-tuning does to the bundled model: questions it answers right before, after, and fused.

    python -m bench finetune [--steps N] [--questions N]

The task is that of `python -m bench.feelings`; no question was in the training data, and only the right word alone is
right. Its result is `finetune`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from phi3_mlx import fuse, tune

from . import feelings, record

MODEL = "tiny"
_FUSED: dict[str, dict[str, Any]] = {
    "fused, bfloat16": {"dequantize": True, "dtype": "bfloat16"},
    "fused, 4 bits": {},
    "fused, changed layers in 8 bits": {"bits": 8},
}


@click.command(help=__doc__)
@click.option("--steps", type=int, help="Instead of two epochs.")
@click.option("--questions", type=int, default=feelings.SIZES["test"], show_default=True)
def main(steps: int | None, questions: int) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        task, adapter = Path(folder, "task"), Path(folder, "adapter")
        feelings.write(task, feelings.SIZES | {"test": questions})

        def row(what: str, model: str, adapter: str | None = None, survived: float | None = None) -> None:
            right = feelings.accuracy(task, model, adapter)
            rows.append({"model": what, "right": right, "survived": survived})
            click.echo(f"{what:32} {right:6.1%} of {questions}")

        row(MODEL, MODEL)
        how = {"epochs": 2.0} if steps is None else {"steps": steps}
        result = tune(MODEL, task, adapter, learning_rate=2e-3, batch_size=16, **how)
        row("with the adapter", MODEL, str(adapter))
        for what, options in _FUSED.items():
            fused = fuse(adapter, Path(folder, what), **options)
            row(what, str(fused.path), survived=fused.survived)
    facts = {"questions": questions, "steps": result.step, "seconds": result.seconds}
    record.write("finetune", rows, "mlx", **facts, loss=result.best_loss)


if __name__ == "__main__":
    main()
