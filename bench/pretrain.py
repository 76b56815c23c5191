"""Speed of pretraining a small model on a CPU: phi3-mlx and PyTorch in turn, the same shape, AdamW, tokens a step.

    python -m bench pretrain [--steps N] [--runs N] [--compile]

The config has 1.3 million parameters: 4 layers, 128 wide, 4,032 tokens. Both read random words in rows of 512 tokens, 8
a step; ours are documents of 60 to 350 tokens, each of which sees itself alone, PyTorch's are cut from one stream and
attention crosses documents, as most loops have it. `--compile` lets torch.compile have the loss, as
weights/training/train.py does. The first steps are not timed. PyTorch has a process of its own, each time anew. CPU
seconds are those of a process, so that a busy machine changes them less. Without transformers ours is measured alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from phi3_mlx import load_tokenizer, pretrain, tokenize_data

from . import record
from .contenders import apart

SHAPE = {
    "model_type": "phi3",
    "vocab_size": 4032,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ROW, ROWS, _WARM = 512, 8, 2


def speeds(marks: list[tuple[float, float, int]]) -> dict[str, float]:
    """Of (wall clock, CPU clock, tokens) at the end of each step, the first ones left out."""
    timed = marks[_WARM - 1 :]
    tokens = sum(count for _, _, count in timed[1:])
    wall, cpu = (timed[-1][i] - timed[0][i] for i in (0, 1))
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def ours(folder: Path, steps: int) -> dict[str, float]:
    marks: list[tuple[float, float, int]] = []
    with tempfile.TemporaryDirectory() as output:
        pretrain(
            folder / "config.json", folder / "shards", Path(output, "run"), tokenizer="tiny", holdout=0.0,
            max_length=ROW, batch_size=ROWS, steps=steps + _WARM, save_every=10**6, notify=lambda _: None,
            on_step=lambda report: marks.append((time.perf_counter(), time.process_time(), report.tokens)),
        )  # fmt: skip
    return speeds(marks)


def theirs(steps: int, compiled: bool) -> dict[str, float]:
    import torch
    import torch.nn.functional as F
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**{key: value for key, value in SHAPE.items() if key != "model_type"},
                        bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False)  # fmt: skip
    model = Phi3ForCausalLM._from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), fused=True)

    def loss_of(ids: Any) -> Any:
        logits = model(ids[:, :-1]).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    rng = np.random.default_rng(0)
    marks: list[tuple[float, float, int]] = []
    for _ in range(steps + _WARM):
        loss_of(torch.tensor(rng.integers(3, 4000, (ROWS, ROW + 1)))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append((time.perf_counter(), time.process_time(), ROWS * ROW))
    return speeds(marks)


def write_corpus(folder: Path, steps: int) -> None:
    """A config, and token shards of random words."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    words = [f" w{i}" for i in range(500)]
    documents = max(40, ROW * ROWS * (steps + _WARM) // 500)
    lines = (json.dumps({"text": "".join(rng.choice(words, int(rng.integers(20, 117))))}) for _ in range(documents))
    (folder / "texts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    tokenize_data(folder / "texts.jsonl", folder / "shards", load_tokenizer("tiny"))


@click.command(help=__doc__)
@click.option("--steps", default=20, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile for PyTorch's loss; compiling takes minutes.")
def main(steps: int, runs: int, compiled: bool) -> None:
    figures: dict[str, dict[str, list[float]]] = {}
    contenders: dict[str, Any] = {"phi3-mlx": None, "PyTorch": None}
    try:
        import transformers  # noqa: F401
    except ImportError:
        del contenders["PyTorch"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, steps)
        for _ in range(runs):
            for package in contenders:
                made = ours(folder, steps) if package == "phi3-mlx" else apart(theirs, steps, compiled)
                for figure, value in made.items():
                    figures.setdefault(package, {}).setdefault(figure, []).append(value)
    rows: list[dict[str, Any]] = [
        {"package": package, **{key: record.spread(v) for key, v in own.items()}} for package, own in figures.items()
    ]
    for row in rows:
        wall, cpu = (row[key]["median"] for key in ("tokens_per_second", "tokens_per_cpu_second"))
        click.echo(f"{row['package']:9} {wall:9,.0f} tok/s  {cpu:9,.0f} tokens a CPU second")
    packages = ["mlx", *(["torch", "transformers"] if len(rows) > 1 else [])]
    record.write("pretrain", rows, *packages, steps=steps, rows_a_step=ROWS, row=ROW, compiled=compiled)


if __name__ == "__main__":
    main()
