"""What packing keys and values costs: the same weights with a packed cache and with none, on text and on generations.

    python -m bench kvquality [--model NAME] [--bits B] [--group-size N] [--tokens N] [--window N]

The text is read 16 tokens at a time, in windows: every token attends to quantized keys and values by the
path that decoding takes. KL is that of the next token's distribution, packed from floats, in nats; "same choice" is
how often both find the same token likeliest. Then both go on by themselves, greedily, from four places of the text.
The result is `kvquality`, for other models `kvquality-NAME`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import Generation, KVBits, Sampling, resolve
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.prefill import common_length
from phi3_mlx.errors import OptionError
from phi3_mlx.evaluation.quality import Difference, blocks
from phi3_mlx.models.decoder import Model
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.text.tokenizer import read_tokenizer

from . import record

CHUNK = 16  # tokens at a time; packed caches are read as they are by up to 32 queries
GENERATED, OPENING, GENERATIONS = 64, 48, 4
BITS = ("8", "6", "4", "3", "2", "8,4", "4,8")


def hidden_states(model: Model, inputs: mx.array, bits: KVBits | None) -> mx.array:
    """The last hidden states (B, L, hidden_size) of ids (B, L), read by the chunk."""
    cache = model.make_cache([inputs.shape[1]] * inputs.shape[0], bits=bits)
    parts = []
    for first in range(0, inputs.shape[1], CHUNK):
        parts.append(model.model(inputs[:, first : first + CHUNK], cache))
        mx.eval(parts[-1], [layer.state for layer in cache])
    return mx.concatenate(parts, axis=1)


def continuations(model: Model, ids: list[int], bits: KVBits | None) -> list[list[int]]:
    """What the model says after openings from all over the text, as token ids."""
    step = max(1, (len(ids) - OPENING) // GENERATIONS)
    prompts = [ids[first : first + OPENING] for first in range(0, step * GENERATIONS, step)]
    said: list[list[int]] = [[] for _ in prompts]
    for token in Generation(model, prompts, max_tokens=GENERATED, sampling=Sampling(), kv_bits=bits):
        said[token.row].append(token.id)
    return said


def measure(directory: Path, settings: list[KVBits], tokens: int, window: int) -> list[dict[str, Any]]:
    model, tokenizer = read_model(directory), read_tokenizer(directory)
    ids = tokenizer.encode(bundled("sample"))[:tokens]
    windows = [(block[:, :-1], block[:, 1:].flatten()) for block in blocks(ids, window, None)]
    expected = [hidden_states(model, inputs, None) for inputs, _ in windows]
    said = continuations(model, ids, None)
    workload = replace(Workload.of_model(model, 1024), itemsize=2)  # as on a GPU
    in_floats = workload.cache_bytes()
    rows = []
    for bits in settings:
        difference = Difference()
        for (inputs, targets), one in zip(windows, expected, strict=True):
            other = hidden_states(model, inputs, bits)
            difference.add(one, model.logits, other, model.logits, targets, model.config.vocab_size)
        found = difference.result(1)
        lengths = [common_length(a, b) for a, b in zip(said, continuations(model, ids, bits), strict=True)]
        row = {
            "keys": bits.keys,
            "values": bits.values,
            "group_size": bits.group_size,
            "size": replace(workload, bits=bits).cache_bytes() / in_floats,
            "kl": found.kl,
            "same_choice": found.top1,
            "perplexity": found.b.perplexity,
            "unpacked_perplexity": found.a.perplexity,
            "alike": sum(lengths) / len(lengths),
        }
        rows.append(row)
        click.echo(
            f"keys {bits.keys} values {bits.values} group {bits.group_size}  KL {found.kl:.5f}  same choice "
            f"{found.top1:.1%}  perplexity {found.b.perplexity:.3f}  {row['alike']:.0f} of {GENERATED} tokens alike"
        )
    return rows


@click.command(help=__doc__)
@click.option("--model", "name", default="tiny", show_default=True)
@click.option(
    "--bits", "widths", multiple=True, default=BITS, show_default=True, help='"8", or "8,4" of keys and values.'
)
@click.option("--group-size", "groups", multiple=True, type=int, default=(32, 64), show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="Of the bundled sample text, at most.")
@click.option("--window", default=512, show_default=True)
def main(name: str, widths: tuple[str, ...], groups: tuple[int, ...], tokens: int, window: int) -> None:
    settings = []
    for group in groups:
        for width in widths:
            keys, _, values = width.partition(",")
            try:
                settings.append(KVBits(int(keys), int(values or keys), group))
            except (ValueError, OptionError) as error:
                raise click.UsageError(f"--bits {width}, --group-size {group}: {error}") from None
    directory = resolve(name)
    rows = measure(directory, settings, tokens, window)
    facts = {"tokens": tokens, "window": window, "chunk": CHUNK, "generated": GENERATED, "generations": GENERATIONS}
    result = "kvquality" if name == "tiny" else f"kvquality-{directory.name}"
    record.write(result, rows, "mlx", model=directory.name, **facts)


if __name__ == "__main__":
    main()
