"""What a schema costs and spares: steps and tokens a second of an object of 20 fields, and the time of a mask.

    python -m bench schema [--layers N] [--width N] [--runs N] [--vocabulary N ...]

A model with random weights in float32 and the bundled vocabulary answers with an object of 20 fields, each true or
false, a word of two, or a number. `masks alone` draws each token in a step of its own; `together` reads what must
follow in one pass. The run fails if a token differs. Then masks are timed by the clock: one is computed and applied to
logits for each token of answers to the same schema with texts as well, which are drawn at random. The vocabularies are
stand-ins of the wanted size: all bytes, the signs between the parts of JSON, and made-up words.

A mask is computed while the device is in the pass whose logits it is for. So last it is measured what a step of the
engine pays, with a model of 4 layers 256 wide: from the logits of the pass to those that the mask is applied to.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np

from phi3_mlx import Generation, Sampling, load_tokenizer
from phi3_mlx.engine.processors import Constraint, Processor
from phi3_mlx.generation.request import Request
from phi3_mlx.models import build, parse_config
from phi3_mlx.models.decoder import Model
from phi3_mlx.text.grammar import AnswerMatcher, Form, matchers
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

from . import record
from .models import PHI_3_MINI

KINDS = ({"type": "boolean"}, {"enum": ["duck", "frog"]}, {"type": "integer", "minimum": 0, "maximum": 99})
TEXT = {"type": "string", "maxLength": 40}
NAMES = "name size colour weight owner origin price stock maker model serial rating width height depth".split()
SPANS = ("computed", "applied")
PAID_SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
_WAITED = 50  # microseconds: so long is waited for logits that are not there; others are, or nearly
_SIGNS = ('{"', '"}', '":', '":"', '","', ',"', '",', '"', "[", "]", "}", "},", "  ", "\n\n")


def form_of(kinds: Sequence[dict[str, Any]]) -> Form:
    """An object of 20 fields, whose values take turns."""
    names = [*NAMES, "age", "state", "kind", "first place", "last place"]
    fields = {f"{name} of the animal": kind for name, kind in zip(names, itertools.cycle(kinds), strict=False)}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    form = Request(schema=schema).form
    assert form is not None
    return form


class MaskAlone:
    """A constraint of which the engine does not know what it forces."""

    reads_answer = True

    def __init__(self, matcher: AnswerMatcher):
        self._constraint = Constraint(matcher)

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        return self._constraint(answer, logits)


def answer(
    model: Model, tokenizer: Tokenizer, rows: int, temperature: float, kind: Callable[[AnswerMatcher], Processor]
) -> tuple[list[list[int]], dict[str, float]]:
    """The tokens of each row, and the steps and speed."""
    prompts = [[3 + (i * i + row) % 4000 for i in range(64)] for row in range(rows)]
    processors = [[kind(matcher)] for matcher in matchers(form_of(KINDS), tokenizer, rows)]
    run = Generation(
        model,
        prompts,
        max_tokens=1000,
        sampling=Sampling(temperature, seed=1),
        stop_ids=tokenizer.stop_ids,
        processors=processors,
    )
    told: list[list[int]] = [[] for _ in prompts]
    for token in run:
        told[token.row].append(token.id)
    return told, {"steps": run.statistics.decode_steps, "tokens_per_second": run.statistics.decode_tps}


def compared(model: Model, tokenizer: Tokenizer, rows: int, temperature: float, runs: int) -> dict[str, Any]:
    """A row of the result. ClickException if a token differs on a CPU."""
    speeds: dict[str, list[float]] = {"masks alone": [], "together": []}
    steps: dict[str, int] = {}
    for run in range(runs + 1):  # the first warms up
        alone, slow = answer(model, tokenizer, rows, temperature, MaskAlone)
        together, fast = answer(model, tokenizer, rows, temperature, Constraint)
        if alone != together and not record.on_gpu():
            raise click.ClickException("a token is another one where tokens are read together")
        for name, figures in (("masks alone", slow), ("together", fast)):
            steps[name] = int(figures["steps"])
            if run:
                speeds[name].append(figures["tokens_per_second"])
    ratios = [fast / slow for slow, fast in zip(*speeds.values(), strict=True)]
    return {
        "rows": rows,
        "temperature": temperature,
        "tokens": sum(map(len, alone)),
        "steps": steps,
        "tokens_per_second": {name: record.spread(some) for name, some in speeds.items()},
        "ratio": record.spread(ratios),
    }


def vocabulary(size: int) -> Tokenizer:
    """A tokenizer with `size` tokens that reads like those of the family."""
    syllables = [a + b for a in ("", *"bcdfghjklmnprstvwz") for b in ("a", "e", "i", "o", "u", "en", "er", "al")]
    words = ("".join(parts) for n in (1, 2, 3) for parts in itertools.product(syllables, repeat=n))
    spelled = (form for word in words for form in (word, " " + word, word.capitalize(), " " + word.capitalize()))
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    tokens |= dict.fromkeys(sign.encode() for sign in _SIGNS)
    for word in spelled:
        if len(tokens) >= size - 1:
            break
        tokens.setdefault(word.encode())
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    end = {"content": "<|endoftext|>", "special": True}
    config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": {str(size - 1): end}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "made.tiktoken").write_bytes(b"".join(lines))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return read_tokenizer(Path(folder))


class Timed:
    """A matcher that keeps its last mask, and when it was known: by the wall's clock and by the processor's."""

    def __init__(self, matcher: AnswerMatcher):
        self._matcher = matcher
        self.mask, self.known = np.zeros(0, np.uint8), clocks()

    def allowed(self, answer: Sequence[int]) -> np.ndarray:
        mask = self._matcher.allowed(answer)
        assert mask is not None
        self.mask, self.known = mask, clocks()
        return mask

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        return self._matcher.forced(answer, most)


def clocks() -> np.ndarray:
    """Microseconds (2,): of the wall, and of the processor, which other programs do not add to."""
    return np.array([time.perf_counter_ns(), time.process_time_ns()]) / 1000


def masks(tokenizer: Tokenizer, answers: int) -> dict[str, Any]:
    """The microseconds of masks for a vocabulary: computed, and computed and applied."""
    random, form = np.random.default_rng(0), form_of((*KINDS, TEXT))
    logits = mx.random.normal((tokenizer.vocab_size,))
    mx.eval(logits)
    computed, applied = [], []
    for run in range(answers + 1):
        told: list[int] = []
        (matcher,) = matchers(form, tokenizer, 1)
        timed = Timed(matcher)
        constraint = Constraint(timed)
        while True:
            began = clocks()
            mx.eval(constraint(told, logits))
            done = clocks()
            if run:  # the first warms up
                computed.append(timed.known - began)
                applied.append(done - began)
            token = int(random.choice(timed.mask.nonzero()[0]))
            if token in tokenizer.stop_ids:
                break
            told.append(token)
    spreads = {name: percentiles(some) for name, some in zip(SPANS, (computed, applied), strict=True)}
    return {"vocabulary": tokenizer.vocab_size, "masks": len(applied), "load": os.getloadavg()[0], **spreads}


class Paid:
    """A constraint that keeps what a step pays for its mask, in microseconds, and how many masks cost it no waiting."""

    reads_answer = True

    def __init__(self, matcher: AnswerMatcher):
        self._constraint = Constraint(matcher)
        self.times: list[np.ndarray] = []
        self.hidden = 0

    def __call__(self, answer: Sequence[int], logits: mx.array) -> mx.array:
        began = clocks()
        masked = self._constraint(answer, logits)  # the mask is known, and nothing is waited for
        known = clocks()
        mx.eval(logits)
        ready = clocks()
        mx.eval(masked)
        hidden = bool(ready[0] - known[0] > _WAITED)
        self.hidden += hidden
        # Logits that were there may have been since the mask was begun.
        self.times.append(clocks() - (ready if hidden else began))
        return masked


def paid(tokenizer: Tokenizer, answers: int) -> dict[str, Any]:
    """What steps of the engine pay for masks: from logits to masked logits, and the milliseconds of a whole step."""
    heads = {"num_key_value_heads": 4, "torch_dtype": "float32", "tie_word_embeddings": True}
    mx.random.seed(0)
    model = build(parse_config({**PHI_3_MINI, **PAID_SHAPE, **heads, "vocab_size": tokenizer.vocab_size}))
    mx.eval(model.parameters())
    form = form_of((*KINDS, TEXT))
    masks, steps = [Paid(matcher) for matcher in matchers(form, tokenizer, answers + 1)], []
    for number, mask in enumerate(masks):
        run = Generation(
            model,
            [[3 + (i * i + number) % 200 for i in range(16)]],
            max_tokens=1000,
            sampling=Sampling(1.0, seed=number),
            stop_ids=tokenizer.stop_ids,
            processors=[[mask]],
        )
        for _ in run:
            pass
        steps.append(1000 / run.statistics.decode_tps)
    counted = masks[1:]  # the first warms up
    return {
        "vocabulary": tokenizer.vocab_size,
        "step": record.spread(steps[1:]),
        "hidden": sum(mask.hidden for mask in counted) / sum(len(mask.times) for mask in counted),
        "paid": percentiles([time for mask in counted for time in mask.times]),
        "load": os.getloadavg()[0],
    }


def percentiles(times: Sequence[np.ndarray]) -> dict[str, float]:
    """Of the wall's clock, and p99 of the processor's."""
    wall, processor = np.array(times).T
    return {
        **{f"p{p}": float(np.percentile(wall, p)) for p in (50, 90, 99)},
        "cpu_p99": float(np.percentile(processor, 99)),
    }


@click.command(help=__doc__)
@click.option("--layers", default=8, show_default=True)
@click.option("--width", default=768, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--vocabulary", "sizes", multiple=True, type=int, default=(32064, 200064), show_default=True)
@click.option("--answers", default=10, show_default=True, help="That masks are timed in.")
def main(layers: int, width: int, runs: int, sizes: tuple[int, ...], answers: int) -> None:
    tokenizer = load_tokenizer("tiny")
    shape = {"vocab_size": 4032, "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "torch_dtype": "float32"}
    mx.random.seed(0)
    model = build(parse_config({**PHI_3_MINI, **shape, **heads}))
    mx.eval(model.parameters())
    rows = []
    for count, temperature in ((1, 0.0), (1, 1.0), (4, 1.0)):
        row = compared(model, tokenizer, count, temperature, runs)
        steps, speed = row["steps"], row["tokens_per_second"]
        click.echo(
            f"{count} at temperature {temperature}: {row['tokens']} tokens in {steps['together']} steps, not "
            f"{steps['masks alone']}; {speed['together']['median']:.0f} tokens/s, not "
            f"{speed['masks alone']['median']:.0f}: {row['ratio']['median']:.1f}x"
        )
        rows.append(row)
    for size in sizes:
        row = masks(vocabulary(size), answers)
        texts = [
            "{} {p50:.0f}, p99 {p99:.0f} ({cpu_p99:.0f} on the processor)".format(name, **row[name]) for name in SPANS
        ]
        click.echo(f"{size:,} tokens, {row['masks']} masks, microseconds: {'; '.join(texts)} (load {row['load']:.1f})")
        rows.append(row)
    for size in sizes:
        row = paid(vocabulary(size), answers)
        click.echo(
            f"{size:,} tokens, in steps of {row['step']['median']:.1f} ms: {row['hidden']:.1%} of the masks are known "
            "before the logits; a step pays {p50:.0f} microseconds, p99 {p99:.0f}".format(**row["paid"])
            + f" (load {row['load']:.1f})"
        )
        rows.append(row)
    record.write("schema", rows, "mlx", "llguidance", layers=layers, width=width)


if __name__ == "__main__":
    main()
