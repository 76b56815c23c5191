"""Learning from preferences: memory beside mlx-lm-lora, and questions answered right before and after.

    python -m bench preferences [--layers N] [--small] [--length N] [--steps N] [--questions N]

Memory: the peak of MLX's allocations in DPO, weights included, with LoRA on layers of Phi-3-mini's shape (random
weights, float32), for pairs of equally long answers. mlx-lm-lora has the reference as a second model, as its own
program loads it. Each runs in a process of its own.

Accuracy: the bundled model learns to answer as people do who are right half of the time, in a word, and else wrong
and at length: supervised, on both answers of each pair of `python -m bench.feelings DIRECTORY pairs`. Then DPO tells
it which of the two is preferred. `phi3_mlx.evaluate` asks it questions that were in no pair. The results are
`preferences` and `preference-answers`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import click
import mlx.core as mx
import numpy as np

from phi3_mlx import evaluate, load, tune
from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.pairs import PreferencePair
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.trainer import Trainer

from . import feelings, record
from .models import RANK, SMALL, make_checkpoint

_PAIRS, _THEIRS = 8, "mlx-lm-lora"
_ASKED = "Question: {}\nAnswer:"  # as `evaluate` asks questions of one's own


def ids_of(length: int, vocab: int) -> list[list[np.ndarray]]:
    """Two sequences of `length` tokens a pair, of which the first half is the same."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(_PAIRS):
        prompt = rng.integers(10, vocab, length // 2)
        answers = [rng.integers(10, vocab, length - length // 2) for _ in range(2)]
        made.append([np.concatenate([prompt, answer]).astype(np.int32) for answer in answers])
    return made


def ours(directory: Path, length: int, steps: int) -> dict[str, float]:
    """What is in memory once the model is there, and at the peak, in bytes."""
    model = read_model(directory, dtype="float32")
    attach(model, find_targets(model.config), RANK, 2.0 * RANK)
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    trained = np.arange(length) >= length // 2
    pairs = []
    for n, both in enumerate(ids_of(length, model.config.vocab_size)):
        chosen, rejected = (Example(ids, trained, f"made:{n}") for ids in both)
        pairs.append(PreferencePair(chosen, rejected, length // 2))
    settings = Settings(data="-", output="-", objective="dpo", batch_size=1, steps=steps, save_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        mx.reset_peak_memory()
        Trainer(model, pairs, [], settings, Path(folder), {}).run()
    return {"weights": weights, "peak_memory": mx.get_peak_memory()}


def theirs(directory: Path, length: int, steps: int) -> dict[str, float]:
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from mlx_lm_lora.trainer import dpo_trainer

    def read() -> Any:
        model, _ = load_model(directory)
        model.set_dtype(mx.float32)
        model.freeze()
        mx.eval(model.parameters())
        return model

    model = read()
    weights = mx.get_active_memory()
    names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": names})
    reference = read()
    lines = [
        {"chosen": both[0].tolist(), "rejected": both[1].tolist(), "chosen_prompt_length": length // 2,
         "rejected_prompt_length": length // 2}
        for both in ids_of(length, model.args.vocab_size)
    ]  # fmt: skip
    # Its trainer asks for a limit that only a GPU has.
    limit = {**mx.device_info(), "max_recommended_working_set_size": 0}
    known = (
        mock.patch.object(mx, "device_info", return_value=limit),
        mock.patch.object(mx, "set_wired_limit", return_value=0),
    )
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        arguments = dpo_trainer.DPOTrainingArgs(
            batch_size=1,
            iters=steps,
            val_batches=0,
            steps_per_report=10**6,
            steps_per_eval=10**6,
            steps_per_save=10**6,
            max_seq_length=length,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        if mx.default_device().type == mx.DeviceType.cpu:
            for patch in known:
                stack.enter_context(patch)
        mx.reset_peak_memory()
        dpo_trainer.train_dpo(model, reference, optim.AdamW(learning_rate=2e-5), lines, args=arguments)
    return {"weights": weights, "peak_memory": mx.get_peak_memory()}


_CONTENDERS = {"phi3-mlx": ours, _THEIRS: theirs}


def measured(name: str, directory: Path, length: int, steps: int) -> dict[str, float]:
    """A contender's figures, from a process of its own."""
    script = f"from bench import preferences as p; p.tell({name!r}, {str(directory)!r}, {length}, {steps})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=record.offline())
    if done.returncode:
        raise click.ClickException(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def tell(name: str, directory: str, length: int, steps: int) -> None:
    """Print a contender's figures as the last line, as JSON."""
    click.echo(json.dumps(_CONTENDERS[name](Path(directory), length, steps)))


def both_answers(task: Path) -> Path:
    """Examples of both answers to every question; their file."""
    pairs = [json.loads(line) for line in (task / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [{"prompt": pair["prompt"], "completion": pair[name]} for pair in pairs for name in ("chosen", "rejected")]
    path = task / "both.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def answers(questions: int, steps: int | None) -> tuple[list[dict[str, Any]], int]:
    """The share of the questions that are answered right, before and after, and how many steps were trained."""
    with tempfile.TemporaryDirectory() as folder:
        task, adapter = Path(folder, "task"), Path(folder, "adapter")
        feelings.write(task, feelings.SIZES | {"test": questions}, as_pairs=True, asked=_ASKED)
        asked = feelings.write_questions(task)
        rows = []

        def row(what: str, adapter: Path | None = None) -> None:
            results = evaluate(*load("tiny", adapter=adapter), str(asked), chat=True)["results"]["questions"]
            right, error = results["exact_match,none"], results["exact_match_stderr,none"]
            rows.append({"model": what, "right": right, "error": error})
            click.echo(f"{what:18} {right:6.1%} of {questions}")

        how = {"epochs": 1.0} if steps is None else {"steps": steps}
        taught = tune("tiny", both_answers(task), Path(folder, "taught"), learning_rate=2e-3, batch_size=16, **how)
        row("taught both answers", taught.output)
        result = tune(
            "tiny", task, adapter, from_adapter=taught.output, objective="dpo", learning_rate=2e-4, batch_size=16, **how
        )
        row("after DPO", adapter)
    return rows, result.step


@click.command(help=__doc__)
@click.option("--layers", default=2, show_default=True, help="Phi-3-mini has 32.")
@click.option("--small", is_flag=True, help="The bundled model's widths, to try it out.")
@click.option("--length", default=128, show_default=True, help="Tokens of a prompt with its answer.")
@click.option("--steps", default=3, show_default=True, help="Of the measurement of memory.")
@click.option("--questions", default=feelings.SIZES["test"], show_default=True)
@click.option("--train", type=int, help="Steps of each training, instead of an epoch.")
def main(layers: int, small: bool, length: int, steps: int, questions: int, train: int | None) -> None:
    contenders = [name for name in _CONTENDERS if name != _THEIRS or find_spec("mlx_lm_lora")]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        make_checkpoint(directory, layers, "float32", 0, **(SMALL if small else {}))
        figures = {name: measured(name, directory, length, steps) for name in contenders}
    rows: list[dict[str, Any]] = []
    for name, figure in figures.items():
        rows.append({"package": name, **figure})
        share = (figure["peak_memory"] - figure["weights"]) / figure["weights"]
        click.echo(f"{name:12} peak {figure['peak_memory'] / 1e9:.3f} GB, {share:.2f} of the weights beside them")
    if _THEIRS in figures:
        ratio = figures["phi3-mlx"]["peak_memory"] / figures[_THEIRS]["peak_memory"]
        click.echo(f"phi3-mlx / {_THEIRS}: memory {ratio:.2f}")
    if not small:
        record.write("preferences", rows, "mlx", "mlx-lm", _THEIRS, layers=layers, length=length, steps=steps)
    right, trained = answers(questions, train)
    if train is None:
        record.write("preference-answers", right, "mlx", questions=questions, steps=trained)


if __name__ == "__main__":
    main()
