"""Passages to token ids, ids to rows, and a model of random weights that learns them with the package's trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from phi3_mlx.models import build, parse_config
from phi3_mlx.models.decoder import Model
from phi3_mlx.tuning.checkpoints import newest_checkpoint, read_checkpoint
from phi3_mlx.tuning.events import Listener, StepReport
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.trainer import Trainer

from .plan import Plan

END = 0  # the id in front of every text
_SAVES = 8  # checkpoints of a run


def train_tokenizer(texts: Iterable[str], vocabulary: int, path: Path) -> Any:
    """A byte-level BPE of `tokenizers`, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    unfinished = path.with_suffix(".part")
    tokenizer.save(str(unfinished))
    unfinished.rename(path)
    return tokenizer


def read_tokenizer(path: Path) -> Any:
    """The tokenizer that `train_tokenizer` wrote."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, int32, without an end."""
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]


def rows(passages: Sequence[np.ndarray], plan: Plan, tokens: int, seed: int) -> list[Example]:
    """Passages end to end in rows, of which a model reads `tokens`; anew in another order as often as it takes.

    A row begins with the token that the one before it predicted last, so nothing is left out.
    """
    rng, needed = np.random.default_rng(seed), tokens + 1
    stream: list[np.ndarray] = []
    while needed > 0:
        for i in rng.permutation(len(passages)):
            stream += [np.array([END], np.int32), passages[i]]
            needed -= 1 + len(passages[i])
            if needed <= 0:
                break
    ids = np.concatenate(stream)
    trained = np.ones(plan.row + 1, bool)
    trained[0] = False
    starts = range(0, tokens - plan.row + 1, plan.row)
    return [Example(ids[start : start + plan.row + 1], trained, f"row {start // plan.row}") for start in starts]


def fresh_model(plan: Plan, seed: int) -> Model:
    """A model of random weights: normal, 0.02, and less where layers add to what passes through them (as GPT-2)."""
    config = {
        "model_type": "phi3",
        "vocab_size": plan.vocabulary,
        "max_position_embeddings": plan.row,
        "original_max_position_embeddings": plan.row,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **plan.shape,
    }
    model = build(parse_config(config))
    mx.random.seed(seed)
    small = 0.02 / math.sqrt(2 * plan.shape["num_hidden_layers"])
    drawn = [
        (
            name,
            mx.random.normal(
                array.shape, scale=small if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            ),
        )
        for name, array in tree_flatten(model.parameters())
        if array.ndim == 2
    ]
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())
    return model


def learn(plan: Plan, examples: list[Example], rate: float, seed: int, folder: Path, what: str) -> Model:
    """The model after it read `examples` once. It goes on from the checkpoint in `folder`, if there is one."""
    model = fresh_model(plan, seed)
    steps = math.ceil(len(examples) / plan.rows)
    settings = Settings(
        data="-",
        output="-",
        method="full",
        batch_size=plan.rows,
        steps=steps,
        learning_rate=rate,
        weight_decay=0.1,
        save_every=max(1, steps // _SAVES),
        seed=seed,
    )

    def told(report: StepReport) -> None:
        if report.step % max(1, steps // 4) == 0:
            print(f"{what}: step {report.step} of {steps}, loss {report.loss:.3f}", flush=True)

    identity = {"run": what, "tokens": plan.tokens, "rate": rate}
    trainer = Trainer(model, examples, [], settings, folder, identity, Listener(step=told))
    if checkpoint := newest_checkpoint(folder):
        trainer.resume(checkpoint)
    trainer.run()
    return model


def learnt(plan: Plan, folder: Path) -> Model:
    """The model that `learn` left in `folder`."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None, folder
    model = fresh_model(plan, 0)
    model.update(tree_unflatten([*read_checkpoint(checkpoint)[0].items()]))
    return model
