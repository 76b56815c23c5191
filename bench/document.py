"""A file of 100,000 tokens through `phi3-mlx generate -f`, in memory that a run without a plan exceeds.

    python -m bench document [--tokens N] [--text FILE]

The model has two layers with 4 heads of Phi-3-mini's size and random 4-bit weights, and the bundled model's tokenizer:
what it says is nothing, what it takes is as of a trained one. The memory allowed is a tenth more than the plan with
4-bit keys and values. Under it, `phi3-mlx generate` is tried without packing, which must be refused in one line, then
with `--kv-bits 4`, which must end within the limit. mlx-lm reads the same prompt until it has taken more than that; the
run fails if it never does. Peaks are MLX's own count, weights included. The text is your file's beginning, or the one
that comes with this package, over and over.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import KVBits, encode_prompt
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine.plan import Workload
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

from . import record
from .models import make_model

ASK = "Summarise this:"
BITS, ANSWER = 4, 256  # the answer is long enough to make the cache grow, as the plan says
CONTEXT = 131_072


class Exceeded(Exception):
    """mlx-lm took more than the limit."""


def cut(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """As much of a text, repeated if need be, as makes a prompt of this many tokens."""
    ids = tokenizer.encode(text)
    text *= math.ceil(tokens / len(ids))
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode_prompt(tokenizer, f"{ASK}\n\n{text[:middle]}")) <= tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def ours(model: Path, book: Path, limit: int, *more: str) -> tuple[int, str, str]:
    command = ["generate", "-m", str(model), "-p", ASK, "-f", str(book), "--memory", f"{limit // 10**6}MB"]
    command += ["--max-tokens", str(ANSWER), "--json", *more]
    done = subprocess.run([sys.executable, "-m", "phi3_mlx", *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def theirs(model: Path, ids: list[int], limit: int) -> dict[str, Any]:
    """How far mlx-lm comes before it takes more than the limit."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    read = 0

    def look(done: int, _: int) -> None:
        nonlocal read
        read = done
        if mx.get_peak_memory() > limit:
            raise Exceeded

    loaded = load_model(model)[0]
    mx.eval(loaded.parameters())
    mx.reset_peak_memory()
    try:
        for _ in generate_step(mx.array(ids), loaded, max_tokens=1, prompt_progress_callback=look):
            pass
    except Exceeded:
        pass
    return {"package": "mlx-lm", "read": read, "peak": mx.get_peak_memory()}


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(1000, CONTEXT - ANSWER), default=100_000, show_default=True)
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8; by default a bundled one."
)
def main(tokens: int, text: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, book = Path(folder, "model"), Path(folder, "book.txt")
        make_model(model)
        tokenizer = read_tokenizer(model)
        book.write_text(cut(text.read_text(encoding="utf-8") if text else bundled("sample"), tokenizer, tokens))
        ids = encode_prompt(tokenizer, f"{ASK}\n\n{book.read_text()}")
        needed = Workload.of_directory(model, len(ids) + ANSWER, kv_bits=KVBits(BITS, BITS)).plan(0).total
        limit = math.ceil(1.1 * needed / 1e6) * 10**6
        click.echo(f"{len(ids):,} tokens, {limit / 1e6:,.0f} MB allowed")

        code, out, refusal = ours(model, book, limit)
        if code != 1 or out or refusal.count("\n") != 1 or "--kv-bits" not in refusal:
            raise click.ClickException(f"without packing: exit {code}, {refusal.strip() or 'no refusal'}")
        click.echo(refusal.strip())

        started = time.perf_counter()
        code, out, complaint = ours(model, book, limit, "--kv-bits", str(BITS))
        if code:
            raise click.ClickException(f"with {BITS} bits: exit {code}, {complaint.strip()}")
        answer = json.loads(out)
        rows: list[dict[str, Any]] = [
            {
                "package": "phi3-mlx",
                "read": answer["prompt_tokens"],
                "peak": answer["peak_memory"],
                "planned": needed,
                "seconds": time.perf_counter() - started,
            },
            theirs(model, ids, limit),
        ]
    for row in rows:
        click.echo(f"{row['package']:9} {row['read']:9,} tokens read, peak {row['peak'] / 1e6:,.1f} MB")
    if rows[0]["peak"] > limit or rows[1]["peak"] <= limit:
        raise click.ClickException("the limit was kept or exceeded by the wrong package")
    name = text.stem if text else "sample"
    record.write("document", rows, "mlx", "mlx-lm", limit=limit, text=name, bits=BITS, refusal=refusal.strip())


if __name__ == "__main__":
    main()
