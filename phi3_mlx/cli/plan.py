"""phi3-mlx plan"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from .options import draft_model_option, revision_option
from .terminal import show, show_json

if TYPE_CHECKING:
    from ..engine.plan import Workload

_MACS = (8, 16, 24, 32, 64, 128)  # GiB, which are sold as GB
_KV_BITS = (0, 8, 6, 4, 3, 2)  # 0: not packed


@click.command()
@click.option(
    "-m", "--model", default="tiny", show_default=True, metavar="NAME", help="As in generate; nothing is downloaded."
)
@revision_option
@draft_model_option
@click.option("--context", type=int, metavar="N", help="Show what N tokens need, prompt and answer together.")
@click.option("--memory", metavar="SIZE", help="Plan for a Mac with this much memory (16GB) instead of the usual ones.")
@click.option("--here", is_flag=True, help="Plan for this machine, as it is now.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(
    model: str,
    revision: str | None,
    draft_model: str | None,
    context: int | None,
    memory: str | None,
    here: bool,
    as_json: bool,
) -> None:
    """Show what fits in memory, at which length and bits.

    \b
    phi3-mlx plan -m phi-3.5-mini-4bit
    phi3-mlx plan -m phi-3.5-mini-4bit --context 32768 --memory 16GB
    phi3-mlx plan --here

    The longest context for keys and values of 16 to 2 bits (--kv-bits), on a Mac's GPU: weights, keys and values,
    and the work of reading a prompt, within the part of its memory that Metal recommends.
    """
    from ..engine.capacity import workload_named
    from ..sizes import size_text
    from .tables import print_table

    if here and memory is not None:
        raise click.UsageError("--here and --memory name two machines; give one of them")
    workload = workload_named(model, revision, draft_model=draft_model, here=here)
    weights = workload.plan(0).weights
    longest = workload.config.max_position_embeddings
    if context is not None and not 0 < context <= longest:
        raise OptionError(f"--context {context:,} is outside 1 to {longest:,}, the model's context; give one inside")
    widths = {bits: bits or 8 * workload.itemsize for bits in _KV_BITS}
    machines: list[dict[str, Any]] = []
    for size, within in _rooms(here, memory).items():
        fits = {widths[bits]: _packed(workload, bits).longest(within) for bits in _KV_BITS}
        machines.append({"memory": size, "room": within, "longest": fits})
    facts = {
        "model": model,
        "draft_model": draft_model,
        "weights": weights,
        "context": context or longest,
        "needs": {widths[bits]: _packed(workload, bits, context or longest).plan(0).total for bits in _KV_BITS},
        "machines": machines,
    }
    if as_json:
        show_json(facts, indent=2)
        return
    name = model if draft_model is None else f"{model} with {draft_model}"
    show(f"{name}: weights {size_text(weights)}, context {longest:,} tokens")
    show("The most tokens that fit, by the bits of keys and values:\n")
    print_table(_table(facts, "this machine" if here else memory), right=range(1, len(widths) + 1))
    if len(machines) == 1 and (answer := _answer(weights, context, machines[0], widths)):
        show(f"\n{answer}")


def _rooms(here: bool, memory: str | None) -> dict[int, int]:
    """Bytes of each machine -> those that a run may take there."""
    from ..engine.machine import mac_working_set, room
    from ..sizes import parse_size

    if here:
        now = room()
        return {now: now}
    sizes = [gb * 2**30 for gb in _MACS] if memory is None else [parse_size(memory, sold=True)]
    return {size: mac_working_set(size) for size in sizes}


def _table(facts: dict[str, Any], name: str | None) -> list[list[str]]:
    """A row for what the context needs and one a machine, `name` if it is not one of the usual Macs."""
    from ..sizes import size_text

    rows = [["", *(f"{bits} BITS" for bits in facts["needs"])]]
    rows.append([f"{facts['context']:,} tokens need", *map(size_text, facts["needs"].values())])
    for machine in facts["machines"]:
        room = machine["room"]
        size = f"{room / 1e9:.3g} GB" if room >= 1e9 else size_text(room)
        lengths = [f"{length:,}" if length else "-" for length in machine["longest"].values()]
        called = name or f"{machine['memory'] >> 30} GB Mac"
        rows.append([f"{called} ({size})", *lengths])
    return rows


def _answer(weights: int, context: int | None, machine: dict[str, Any], widths: dict[int, int]) -> str | None:
    """Whether the context that was asked for fits on the one machine, and by which option."""
    from ..sizes import size_text

    if weights > machine["room"]:
        return f"The weights alone, {size_text(weights)}, do not fit."
    if context is None:
        return None
    enough = [bits for bits, width in widths.items() if machine["longest"][width] >= context]
    flag = f" with --kv-bits {enough[0]}" if enough and enough[0] else ""
    return f"{context:,} tokens {f'fit{flag}' if enough else 'do not fit'}."


def _packed(workload: Workload, bits: int, length: int = 1) -> Workload:
    from dataclasses import replace

    from ..models.cache import KVBits

    return replace(workload, length=length, bits=KVBits(bits, bits) if bits else None)
