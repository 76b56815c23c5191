"""GGUF files of `export` in llama.cpp, beside this package's answers: what each type costs, and what differs.

    python -m bench export [--type TYPE ...] [--tokens N] [--longer N]

llama.cpp (node-llama-cpp, which `make llama-cpp` installs) reads files of the bundled model, its cache in float32. KL
is that of its next token's distribution from ours in float32, in nats a token, over every position of a text.

Types: files of the bundled model in 8 bits, within its original length. LongRoPE: llama.cpp takes the factors by the
context that it is started with, so that short prompts, and answers that cross the original length, differ in a longer
context. Experts: llama.cpp runs Phi-3.5-MoE with RMS norms for its LayerNorms, and weighs experts by a softmax of the
two best scores, not by the sparse mixer; a small random model is computed here with either and with both, and with
both it is llama.cpp's. The results are `export`, `export-longrope` and `export-moe`. Without llama.cpp nothing is
measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phi3_mlx import export_gguf, load, load_tokenizer
from phi3_mlx.conversion.options import GGUF_TYPES
from phi3_mlx.models.decoder import Model

from . import record

# llama.cpp as an oracle and small models with experts are the tests'; they live there, and this command borrows them.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import llama_cpp  # type: ignore[import-not-found]
import moe_models  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
TEXT, EIGHT_BITS = ROOT / "notebooks" / "secrets.txt", ROOT / "weights" / "tiny-8bit"
GREEDY = 64
_MOE_TOKENS = 256
_TOP = 2  # experts a token


def distances(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Of two sets of distributions (positions, vocabulary): KL divergence, the largest difference, the same choice."""
    p, q = (part.astype(np.float64) / part.sum(-1, keepdims=True, dtype=np.float64) for part in (expected, found))
    kl = (p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(-1)
    return {
        "kl": float(kl.mean()),
        "largest_difference": float(np.abs(p - q).max()),
        "same_choice": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def probabilities(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Of the next token after each of `ids`: (positions, vocabulary) float32."""
    return np.array(mx.softmax(model(mx.array([ids]))[0].astype(mx.float32), axis=-1))


def greedy(model: Model, ids: Sequence[int]) -> list[int]:
    """The `GREEDY` likeliest tokens that follow, whatever they are."""
    cache = model.make_cache()
    tokens = mx.argmax(model(mx.array([ids]), cache=cache)[:, -1], axis=-1)
    answer = [tokens]
    while len(answer) < GREEDY:
        tokens = mx.argmax(model(tokens[None], cache=cache)[:, -1], axis=-1)
        answer.append(tokens)
    return [int(token) for token in np.array(mx.concatenate(answer))]


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers have in common from their beginning."""
    return next((n for n, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))


def measure_types(types: Sequence[str], ids: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A row a type: the model in llama.cpp, beside ours in float32."""
    model, _ = load(str(EIGHT_BITS), dtype="float32")
    expected, rows = probabilities(model, ids), []
    for kind in types:
        made = export_gguf(EIGHT_BITS, folder / f"{kind}.gguf", type=kind, report=False)
        (found,) = llama_cpp.ask(made.files[0], prompts=[llama_cpp.Prompt(ids)]).probabilities
        rows.append({"type": kind, "bits_per_weight": made.bits_per_weight, **distances(expected, found)})
        _say(kind, rows[-1])
    return rows


def measure_longrope(ids: Sequence[int], longer: int, folder: Path) -> list[dict[str, Any]]:
    """A row a prompt and context: short ones in both contexts, one whose answer crosses the boundary, one beyond it."""
    model, _ = load("tiny", dtype="float32")
    original = model.config.original_max_position_embeddings
    file = export_gguf("tiny", folder / "floats.gguf", type="f32").files[0]
    short, crossing = ids[: original // 2], ids[: original - GREEDY // 2]
    rows = []
    for what, prompt, context in (
        ("a short prompt", short, original),
        ("a short prompt", short, longer),
        ("an answer that crosses the original length", crossing, longer),
        ("a prompt beyond the original length", ids[: longer - GREEDY], longer),
    ):
        answer = llama_cpp.ask(file, prompts=[llama_cpp.Prompt(prompt, greedy=GREEDY)], context=context)
        rows.append(
            {
                "prompt": what,
                "tokens": len(prompt),
                "context": context,
                **distances(probabilities(model, prompt), answer.probabilities[0]),
                "alike": alike(answer.greedy[0], greedy(model, prompt)),
            }
        )
        _say(f"{what}, context {context}", rows[-1])
    return rows


class _RMSNorm(nn.Module):
    """What llama.cpp computes for a LayerNorm: no mean is subtracted; the bias is added all the same."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps) + self.bias


def softmax_of_two(scores: mx.array, _tolerance: float) -> tuple[mx.array, mx.array]:
    """llama.cpp's `phi_moe.route`: the two best experts, their weights a softmax of the two scores."""
    experts = mx.argsort(-scores, axis=-1)[:, :_TOP]
    return experts, mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1)


def with_rms_norms(model: Model) -> None:
    for layer in model.layers:
        layer.input_layernorm = _RMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = _RMSNorm(layer.post_attention_layernorm)
    model.model.norm = _RMSNorm(model.model.norm)


@contextmanager
def routed(route: Callable[..., Any] | None) -> Iterator[None]:
    if route is None:
        yield
        return
    with mock.patch("phi3_mlx.models.phi_moe.route", route):
        yield


def measure_experts(tokens: int, folder: Path) -> list[dict[str, Any]]:
    """How far each of llama.cpp's two errors, and llama.cpp itself, takes a random model; and what is left of it."""
    scaling = {**moe_models.RAW["rope_scaling"], "original_max_position_embeddings": 512}
    lengths = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    raw = {**moe_models.RAW, **lengths, "rope_scaling": scaling, "vocab_size": 4032, "sliding_window": 4096}
    directory = folder / "moe"
    weights = moe_models.hugging_face(moe_models.random_weights(raw))
    moe_models.write(directory, raw, weights, tokenizer=True)
    ids = np.random.default_rng(0).integers(3, 3900, tokens).tolist()

    def computed(*, norms: bool, routing: bool) -> np.ndarray:
        model, _ = load(str(directory), dtype="float32")
        if norms:
            with_rms_norms(model)
        with routed(softmax_of_two if routing else None):
            return probabilities(model, ids)

    file = export_gguf(str(directory), folder / "moe.gguf", type="f32").files[0]
    (theirs,) = llama_cpp.ask(file, prompts=[llama_cpp.Prompt(ids)]).probabilities
    reference, both = computed(norms=False, routing=False), computed(norms=True, routing=True)
    rows = []
    for what, expected, found in (
        ("its norms alone", reference, computed(norms=True, routing=False)),
        ("its routing weights alone", reference, computed(norms=False, routing=True)),
        ("both", reference, both),
        ("llama.cpp", reference, theirs),
        ("llama.cpp, from both", both, theirs),
    ):
        rows.append({"what": what, **distances(expected, found)})
        _say(what, rows[-1])
    return rows


def _say(what: str, row: dict[str, Any]) -> None:
    more = f"  {row['alike']} of {GREEDY} tokens alike" if "alike" in row else ""
    click.echo(
        f"{what}: KL {row['kl']:.2e}  largest difference {row['largest_difference']:.1e}  "
        f"same choice {row['same_choice']:.1%}{more}"
    )


@click.command(help=__doc__)
@click.option("--type", "types", multiple=True, type=click.Choice(GGUF_TYPES), help="By default all.")
@click.option("--tokens", default=448, show_default=True, help="Of the text that each type reads.")
@click.option("--longer", default=2048, show_default=True, help="A context beyond the original length.")
def main(types: tuple[str, ...], tokens: int, longer: int) -> None:
    if llama_cpp.MISSING:
        click.echo(f"nothing was measured: {llama_cpp.MISSING}", err=True)
        return
    package = llama_cpp.HOME / "node_modules" / "node-llama-cpp" / "package.json"
    oracle = f"node-llama-cpp {json.loads(package.read_text())['version']}"
    ids = load_tokenizer("tiny").encode(TEXT.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = measure_types(types or GGUF_TYPES, ids[:tokens], folder)
        record.write("export", rows, "mlx", "gguf", oracle=oracle, tokens=tokens)
        rows = measure_longrope(ids, longer, folder)
        record.write("export-longrope", rows, "mlx", "gguf", oracle=oracle, greedy=GREEDY)
        rows = measure_experts(_MOE_TOKENS, folder)
        record.write("export-moe", rows, "mlx", "gguf", oracle=oracle, tokens=_MOE_TOKENS)


if __name__ == "__main__":
    main()
