"""`python -m bench NAME`: the measurements, one file each, imported when it is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from phi3_mlx import Phi3Error

from . import record

# Bench -> what it measures, so that the list imports none of them.
_BENCHES = {
    "coldstart": "From an empty terminal to the first token, beside mlx-lm.",
    "decode": "Tokens a second of one answer, beside mlx-lm.",
    "host": "What a step costs the processor that queues it, beside mlx-lm.",
    "inside": "What places cost a model that nobody looks into, and what looking costs.",
    "prefill": "Tokens a second of reading a prompt, beside mlx-lm.",
    "lookup": "What prompt lookup saves where text repeats, and costs where it does not.",
    "draft": "What a draft model saves, against how often its guesses hold.",
    "schema": "What a schema costs and spares: steps of an object, and the time of a mask.",
    "batch": "Several prompts together, one by one, and in mlx-lm's batch.",
    "traffic": "Requests that arrive one after another, beside mlx-lm's batch.",
    "serve": "Requests a second of the server, beside mlx-lm's, and what both do with bad input.",
    "prefix": "What a store of prefixes spares where prompts begin alike.",
    "longcontext": "Peak memory of long prompts with a packed cache, beside mlx-lm.",
    "document": "A file of 100,000 tokens summarised in memory that mlx-lm exceeds.",
    "slots": "Attention of rows with caches of their own, in shared arrays and in a padded one.",
    "blocksparse": "A block-sparse layer of Phi-3-small beside dense masked and causal attention.",
    "kvquality": "What packing keys and values costs in quality.",
    "eval": "Questions a second in lm-eval's harness, beside mlx-lm and transformers.",
    "convert": "Time and memory of a conversion, beside mlx-lm.",
    "pretrain": "Speed of pretraining a model of a million parameters, beside PyTorch.",
    "tune": "Speed and memory of fine-tuning, beside mlx-lm.",
    "finetune": "Questions of a small task answered right before fine-tuning, after, and fused.",
    "preferences": "Memory of learning from preferences, beside mlx-lm-lora, and answers before and after.",
    "data": "How well ratings, and filters that learnt them, tell good texts from bad.",
    "betterdata": "Small models that read as much of raw, filtered and synthetic text.",
    "quantization": "KL divergence against bits per weight.",
    "export": "What llama.cpp makes of exported files, beside ours: each type, LongRoPE, experts.",
    "parity": "Logits and greedy tokens against transformers, beside mlx-lm.",
    "readme": "Write the figures of the README and of docs/ from the results.",
}

# The least that still goes through all of a bench.
_QUICK = {
    "coldstart": "--runs 1",
    "decode": "--only float32 --only tiny --layers 1 --tokens 4 --runs 1",
    "host": "--layers 1 --rows 1 --rows 2 --bits 0 --steps 2 --runs 1",
    "inside": "--layers 2 --tokens 8 --pairs 2 --repeats 1",
    "prefill": "--only float32 --only tiny --layers 1 --tokens 16 --runs 1",
    "lookup": "--runs 1 --max-tokens 16 --prompts 1",
    "draft": "--layers 4 --width 256 --tokens 12 --runs 1",
    "schema": "--layers 1 --width 64 --runs 1 --vocabulary 2000 --answers 1",
    "batch": "--only tiny --tokens 1 --runs 1",
    "traffic": "--only unpacked --only tiny --only newcomer --layers 1 --requests 3 --shorter 32 --runs 1 --long 300",
    "serve": "--only floats --clients 2 --requests 2 --answer 4 --shared 64 --layers 1 --runs 1",
    "prefix": "--tokens 64 --questions 2 --plain 1 --turns 1",
    "longcontext": "--tokens 1024 --chunk 256",
    "document": "--tokens 1000",
    "slots": "--rows 2 --layers 1 --steps 1 --runs 1",
    "blocksparse": "--tokens 1280 --linear 1536 --chunk 64 --runs 1",
    "kvquality": "--tokens 256 --bits 8 --bits 4",
    "eval": "--questions 1 --subjects 1",
    "convert": "--layers 1 --runs 1",
    "pretrain": "--steps 2 --runs 1",
    "tune": "--small --steps 2 --runs 1",
    "finetune": "--steps 4 --questions 5",
    "preferences": "--layers 1 --small --length 32 --steps 1 --questions 5 --train 4",
    "data": "--texts 120 --train 4",
    "betterdata": "--smoke",
    "quantization": "tiny --bits 4 --tokens 256 --calibration-tokens 512 --group-size 32",
    "export": "--type q8_0 --tokens 32 --longer 1024",
    "parity": "--only Phi-3-mini-4k --case short",
    "readme": "--check",
}
# What `--all` runs where the default would leave something out.
_FULL = {"quantization": "weights/tiny-8bit"}
_SEND = (
    'To send them, attach this file to an issue of the form "Figures from your Mac"; other machines are welcome too.'
)


class _Benches(click.Group):
    """Finds `bench.NAME.main` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_BENCHES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f".{name}", __package__).main if name in _BENCHES else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Phi3Error as error:
            raise click.ClickException(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benches"):
            formatter.write_dl(list(_BENCHES.items()))


@click.group(
    cls=_Benches, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__
)
@click.option("--all", "everything", is_flag=True, help="Run every bench in turn, for the published results.")
@click.option("--quick", is_flag=True, help="Run every bench at its smallest, into a folder that is thrown away.")
@click.pass_context
def main(context: click.Context, everything: bool, quick: bool) -> None:
    if context.invoked_subcommand is not None:
        if everything or quick:
            raise click.UsageError("--all and --quick run every bench; leave the name away")
    elif quick:
        with tempfile.TemporaryDirectory() as folder:
            run(_QUICK, {record.ELSEWHERE: folder})
            click.echo(f"results written, and thrown away: {', '.join(record.read(Path(folder)))}")
    elif everything:
        try:
            run({name: _FULL.get(name, "") for name in _BENCHES}, {})
        finally:
            click.echo(f"all results: {record.file_here()}\n{_SEND}")
    else:
        click.echo(context.get_help())


def run(benches: dict[str, str], environment: dict[str, str]) -> None:
    """Run benches as processes of their own, so that none starts with another's memory; all of them, then complain."""
    failed = []
    for name, options in benches.items():
        click.echo(click.style(f"python -m bench {name} {options}".strip(), bold=True))
        started = time.perf_counter()
        command = [sys.executable, "-m", "bench", name, *options.split()]
        if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode:
            failed.append(name)
        click.echo(f"{time.perf_counter() - started:.0f} s\n")
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(prog_name="python -m bench")
