"""Logits and greedy tokens of phi3-mlx and of mlx-lm against transformers, float32 on the CPU.

    python -m bench parity [--only NAME] [--case CASE]

The same random weights go into all three. The models are narrow (two layers, one or two heads), but head shapes,
LongRoPE lists, original lengths and windows are the released models' own: no length is scaled down. Of Phi-3.5-MoE
transformers 5 uses the short factors at every length; past the boundary the reference is its model with the long ones.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from . import record
from .agreement import HEAD, STEPS, lines

# The pairs of models are the tests' reference; they live there, and this command borrows them.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import moe_models  # type: ignore[import-not-found]
import oracle  # type: ignore[import-not-found]
import released  # type: ignore[import-not-found]

CHUNK = 512  # prefill chunk of both MLX packages

REAL_LONG = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072, "sliding_window": 262144}
MODELS: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": {**oracle.CONFIGS["mini-4k"], "sliding_window": 2047},
    "Phi-3-mini-128k (June)": {**oracle.BASE, **REAL_LONG, "rope_scaling": released.MINI_128K_JUNE},
    "Phi-3.5-mini": {**oracle.BASE, **REAL_LONG, "rope_scaling": released.PHI_3_5_MINI},
    "Phi-3.5-MoE": {**moe_models.RAW, **REAL_LONG, "rope_scaling": released.PHI_3_5_MOE, "sliding_window": 131072},
    "Phi-4-mini": {**oracle.CONFIGS["phi-4-mini"], **REAL_LONG},
    "Phi-3-medium-4k": {**oracle.CONFIGS["medium-4k"], "sliding_window": 2047},
}
# What is special at a length, by the kind of model.
WINDOWED = {"short": 64, "window": 2047, "window + 1": 2048, "window crossed": 3000}
LONG = {"short": 64, "boundary": 4096, "boundary + 1": 4097, "beyond": 4500}
CROSSING = "generation crossing"
CASES = (*dict.fromkeys([*WINDOWED, *LONG]), CROSSING)


def make_mlx_lm(raw: dict[str, Any], model: Any) -> Any:
    """mlx-lm's model, built from the config as its loader builds it, with the weights of ours."""
    from importlib import import_module

    own = import_module(f"mlx_lm.models.{raw['model_type']}")
    theirs = own.Model(own.ModelArgs.from_dict(raw))
    theirs.load_weights(tree_flatten(model.parameters()), strict=True)
    return theirs


def all_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids)))[0]


def mlx_tokens(model: Any, ids: np.ndarray) -> list[int]:
    """mlx-lm's own loop: greedy, its cache, whatever model."""
    from mlx_lm.generate import generate_step

    stream = generate_step(mx.array(ids), model, max_tokens=STEPS, prefill_step_size=CHUNK)
    return [int(token) for token, _ in stream]


def pair(raw: dict[str, Any]) -> tuple[Any, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], list[int]]]:
    """Our model; the reference's logits (L, V) of ids (L,); the tokens that it puts after them."""
    if raw["model_type"] == "phimoe":
        ours = moe_models.make_ours(raw)
        logits = moe_models.reference(raw, moe_models.random_weights(raw))
        return ours, logits, lambda prompt: greedy(raw, logits, prompt, oracle.generate(ours, prompt, STEPS))
    ours = oracle.make_ours(raw)
    theirs = oracle.make_torch(raw, ours)
    return (
        ours,
        lambda ids: oracle.torch_logits(theirs, ids[None])[0],
        lambda prompt: oracle.torch_generate(theirs, prompt, STEPS),
    )


def greedy(
    raw: dict[str, Any], logits: Callable[[np.ndarray], np.ndarray], prompt: np.ndarray, guess: list[int]
) -> list[int]:
    """The tokens that whole passes put after `prompt`: those of the guess that two passes confirm, then one by one."""
    steps = oracle.every_step(raw, logits, np.array([*prompt, *guess[:-1]]))
    found = steps[len(prompt) - 1 :].argmax(axis=-1).tolist()
    right = next((i for i, token in enumerate(found) if token != guess[i]), len(guess))
    tokens = [*prompt, *found[: right + 1]]
    while len(tokens) < len(prompt) + STEPS:
        tokens.append(int(logits(np.array(tokens))[-1].argmax()))
    return tokens[len(prompt) : len(prompt) + STEPS]


def compare(name: str, cases: Sequence[str]) -> list[dict[str, Any]]:
    """One row a length, and one for the generation that crosses boundary or window; those of `cases`."""
    raw = oracle.slim(MODELS[name])
    ours, logits, reference_tokens = pair(raw)
    packages = {"phi3-mlx": ours, "mlx-lm": make_mlx_lm(raw, ours)}
    special = LONG if raw["rope_scaling"] else WINDOWED
    rows: list[dict[str, Any]] = []
    for label, length in special.items():
        if label not in cases:
            continue
        ids = oracle.ids_of(length)
        expected = logits(ids[0])
        row: dict[str, Any] = {"model": name, "case": label, "tokens": length, "std": float(expected.std())}
        for package, model in packages.items():
            got = all_logits(model, ids)
            row[package] = {
                "max_difference": float(np.abs(got - expected).max()),
                "greedy_agreement": float((got.argmax(-1) == expected.argmax(-1)).mean()),
            }
        rows.append(row)
    if CROSSING not in cases:
        return rows
    edge = raw["original_max_position_embeddings"] if raw["rope_scaling"] else raw["sliding_window"]
    prompt = oracle.ids_of(edge - STEPS // 2)[0]
    tokens = reference_tokens(prompt)
    row = {"model": name, "case": CROSSING, "tokens": len(prompt) + STEPS}
    for package, model in packages.items():
        got_tokens = mlx_tokens(model, prompt)
        equal = [a == b for a, b in zip(got_tokens, tokens, strict=True)]
        row[package] = {
            "equal_tokens": sum(equal),
            "first_difference": equal.index(False) if False in equal else None,
        }
    return [*rows, row]


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, title="against transformers, float32: max |Δlogit|, positions of equal greedy choice")
    for line in lines(rows):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(MODELS)), help="Some models (repeatable).")
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), help="Some cases (repeatable).")
def main(only: tuple[str, ...], cases: tuple[str, ...]) -> None:
    mx.set_default_device(mx.cpu)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's imports
        import mlx_lm.generate  # noqa: F401
        import transformers  # noqa: F401
    rows: list[dict[str, Any]] = []
    for name in only or MODELS:
        started = time.perf_counter()
        rows += compare(name, cases or CASES)
        click.echo(f"{name}: {time.perf_counter() - started:.0f} s", err=True)
    show(rows)
    record.write("parity", rows, "mlx", "mlx-lm", "transformers", "torch", "numpy")


if __name__ == "__main__":
    main()
