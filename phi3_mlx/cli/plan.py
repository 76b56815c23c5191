"""phi3-mlx plan"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError

if TYPE_CHECKING:
    from ..memory import Run

_MACS = (8, 16, 24, 32, 64, 128)  # GiB, which are sold as GB
_BITS = (16, 8, 6, 4, 3, 2)


@click.command()
@click.option(
    "-m", "--model", default="tiny", show_default=True, metavar="NAME", help="As for generate; nothing is fetched."
)
@click.option("--revision", metavar="REV", help="A branch, tag or commit of the repository.")
@click.option("--context", type=int, metavar="N", help="What a sequence of N tokens needs, prompt and answer together.")
@click.option("--memory", metavar="SIZE", help="Plan for a Mac sold with this much (16GB) instead of the usual ones.")
@click.option("--here", is_flag=True, help="Plan for this machine, as it is now.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(model: str, revision: str | None, context: int | None, memory: str | None, here: bool, as_json: bool) -> None:
    """Say what fits in memory, at which length and bits.

    \b
    phi3-mlx plan -m phi-3.5-mini-4bit
    phi3-mlx plan -m phi-3.5-mini-4bit --context 32768 --memory 16GB
    phi3-mlx plan --here

    The longest context for keys and values of 16 to 2 bits (--kv-bits), on a Mac's GPU: weights, keys and values,
    and the work of reading a prompt, within the part of its memory that Metal recommends.
    """
    from ..memory import mac_working_set, memory_sold_as, room, size_text
    from .tables import print_table

    if here and memory is not None:
        raise click.UsageError("--here and --memory name two machines; give one of them")
    run = _run(model, revision, here)
    longest = run.config.max_position_embeddings
    if context is not None and not 0 < context <= longest:
        raise OptionError(f"--context {context:,} is outside 1 to {longest:,}, the model's context; give one inside")
    if here:
        now = room()
        rooms = {now: now}
    else:
        sizes = [gb * 2**30 for gb in _MACS] if memory is None else [memory_sold_as(memory)]
        rooms = {size: mac_working_set(size) for size in sizes}
    rows: list[dict[str, Any]] = []
    for size, within in rooms.items():
        fits = {bits: _packed(run, bits).longest(within) for bits in _BITS}
        rows.append({"memory": size, "room": within, "longest": fits})
    needs = {bits: _packed(run, bits, context or longest).plan(0).total for bits in _BITS}
    if as_json:
        facts = {
            "model": model,
            "weights": run.weights,
            "context": context or longest,
            "needs": needs,
            "machines": rows,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{model}: weights {size_text(run.weights)}, context {longest:,} tokens\n")
    table = [["KEYS AND VALUES IN", *(f"{bits} BITS" for bits in _BITS)]]
    table.append([f"{context or longest:,} tokens need", *(size_text(needs[bits]) for bits in _BITS)])
    for row in rows:
        name = "this machine" if here else memory or f"{row['memory'] >> 30} GB Mac"
        lengths = [f"{row['longest'][bits]:,}" if row["longest"][bits] else "-" for bits in _BITS]
        table.append([f"{name} ({size_text(row['room'])}) holds", *lengths])
    print_table(table, right=range(1, len(table[0])), spare=(3, 5))
    if context is not None and len(rows) == 1:
        enough = [bits for bits in _BITS if rows[0]["longest"][bits] >= context]
        flag = f" with --kv-bits {enough[0]}" if enough and enough[0] != 16 else ""
        click.echo(f"\n{context:,} tokens {f'fit{flag}' if enough else 'do not fit'}.")


def _run(model: str, revision: str | None, here: bool) -> Run:
    """What is known of the model: its files where they are on this disk, else the released shape of its name.

    On a GPU with fused attention, unless `here` is a machine that has none.
    """
    from .. import hub
    from ..checkpoint import computed_size, weight_bytes
    from ..memory import Run
    from ..models import read_config
    from ..models.attention import fused_attention

    fused = not here or fused_attention()
    alias = hub.find_alias(model)
    if alias is not None and hub.on_disk(alias.repo_id, revision) is None:
        return Run(alias.shape, alias.bytes, 1, itemsize=2 if fused else 4, fused=fused)
    directory = hub.resolve(model, revision)
    config = read_config(directory)
    dtype = "float32" if config.dtype == "float32" or not fused else "bfloat16"
    return Run(config, weight_bytes(directory, dtype), 1, itemsize=computed_size(config, dtype), fused=fused)


def _packed(run: Run, bits: int, length: int = 1) -> Run:
    from dataclasses import replace

    from ..models.cache import KVBits

    return replace(run, length=length, bits=None if bits == 16 else KVBits(bits, bits))
