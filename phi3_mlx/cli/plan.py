"""phi3-mlx plan"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from .options import revision_option
from .terminal import show, show_json

if TYPE_CHECKING:
    from ..engine.plan import Workload

_MACS = (8, 16, 24, 32, 64, 128)  # GiB, which are sold as GB
_BITS = (0, 8, 6, 4, 3, 2)  # 0: not packed


@click.command()
@click.option(
    "-m", "--model", default="tiny", show_default=True, metavar="NAME", help="As in generate; nothing is downloaded."
)
@revision_option
@click.option("--context", type=int, metavar="N", help="Show what N tokens need, prompt and answer together.")
@click.option("--memory", metavar="SIZE", help="Plan for a Mac with this much memory (16GB) instead of the usual ones.")
@click.option("--here", is_flag=True, help="Plan for this machine, as it is now.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(model: str, revision: str | None, context: int | None, memory: str | None, here: bool, as_json: bool) -> None:
    """Show what fits in memory, at which length and bits.

    \b
    phi3-mlx plan -m phi-3.5-mini-4bit
    phi3-mlx plan -m phi-3.5-mini-4bit --context 32768 --memory 16GB
    phi3-mlx plan --here

    The longest context for keys and values of 16 to 2 bits (--kv-bits), on a Mac's GPU: weights, keys and values,
    and the work of reading a prompt, within the part of its memory that Metal recommends.
    """
    from ..engine.machine import mac_working_set, room
    from ..sizes import parse_size, size_text
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
        sizes = [gb * 2**30 for gb in _MACS] if memory is None else [parse_size(memory, sold=True)]
        rooms = {size: mac_working_set(size) for size in sizes}
    widths = {bits: bits or 8 * run.itemsize for bits in _BITS}
    rows: list[dict[str, Any]] = []
    for size, within in rooms.items():
        fits = {widths[bits]: _packed(run, bits).longest(within) for bits in _BITS}
        rows.append({"memory": size, "room": within, "longest": fits})
    needs = {widths[bits]: _packed(run, bits, context or longest).plan(0).total for bits in _BITS}
    if as_json:
        facts = {
            "model": model,
            "weights": run.weights,
            "context": context or longest,
            "needs": needs,
            "machines": rows,
        }
        show_json(facts, indent=2)
        return
    show(f"{model}: weights {size_text(run.weights)}, context {longest:,} tokens")
    show("The most tokens that fit, by the bits of keys and values:\n")
    table = [["", *(f"{bits} BITS" for bits in needs)]]
    table.append([f"{context or longest:,} tokens need", *map(size_text, needs.values())])
    for row in rows:
        name = "this machine" if here else memory or f"{row['memory'] >> 30} GB Mac"
        lengths = [f"{length:,}" if length else "-" for length in row["longest"].values()]
        within = row["room"]
        table.append([f"{name} ({f'{within / 1e9:.3g} GB' if within >= 1e9 else size_text(within)})", *lengths])
    print_table(table, right=range(1, len(table[0])))
    if len(rows) == 1 and run.weights > rows[0]["room"]:
        show(f"\nThe weights alone, {size_text(run.weights)}, do not fit.")
    elif context is not None and len(rows) == 1:
        enough = [bits for bits in _BITS if rows[0]["longest"][widths[bits]] >= context]
        flag = f" with --kv-bits {enough[0]}" if enough and enough[0] else ""
        show(f"\n{context:,} tokens {f'fit{flag}' if enough else 'do not fit'}.")


def _run(model: str, revision: str | None, here: bool) -> Workload:
    """What is known of the model: its files where they are on this disk, else the released shape of its name.

    On a GPU with fused attention, unless `here` is a machine that has none; and for prompts of any length, so that an
    answer may begin on this side of LongRoPE's boundary and end beyond it.
    """
    from ..engine.plan import Workload
    from ..models import read_config
    from ..models.attention import fused_attention
    from ..store import hub

    fused = not here or fused_attention()
    alias = hub.find_alias(model)
    if alias is not None and hub.on_disk(alias.repo_id, revision) is None:
        return Workload.of_release(alias.shape, alias.bytes, fused=fused).crossing()
    directory = hub.resolve(model, revision)
    dtype = "float32" if read_config(directory).dtype == "float32" or not fused else "bfloat16"
    return Workload.of_directory(directory, 1, dtype=dtype, fused=fused).crossing()


def _packed(run: Workload, bits: int, length: int = 1) -> Workload:
    from dataclasses import replace

    from ..models.cache import KVBits

    return replace(run, length=length, bits=KVBits(bits, bits) if bits else None)
