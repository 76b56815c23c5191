"""What fits: the memory that a model's run takes, the longest context on a Mac, and the family's table of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import OptionError
from ..models import read_config
from ..models.attention import fused_attention
from ..models.cache import make_kv_bits
from ..sizes import parse_size, size_text
from ..store import hub
from ..store.family import MEMBERS, packed_bytes
from ..values import whole
from .machine import mac_working_set
from .plan import Plan, Workload


def workload_named(
    name: str | Path, revision: str | None = None, *, draft_model: str | Path | None = None, here: bool = False
) -> Workload:
    """What is known of a model: its files where they are on this disk, else the released shape of its name.

    With the draft model of that name, if one is named. One token long, on a GPU with fused attention, unless `here` is
    a machine that has none; and for prompts of any length, so that an answer may begin on this side of LongRoPE's
    boundary and end beyond it.
    """
    if draft_model is not None:
        return replace(workload_named(name, revision, here=here), draft=workload_named(draft_model, here=here))
    fused_kernel = not here or fused_attention()
    alias = hub.find_alias(str(name))
    if alias is not None and hub.on_disk(alias.repo_id, revision) is None:
        return Workload.of_release(alias.shape, alias.bytes, fused_kernel=fused_kernel).crossing()
    directory = hub.resolve(name, revision)
    dtype = "float32" if read_config(directory).dtype == "float32" or not fused_kernel else "bfloat16"
    return Workload.of_directory(directory, 1, dtype=dtype, fused_kernel=fused_kernel).crossing()


def memory_plan(
    name: str | Path,
    tokens: int,
    *,
    revision: str | None = None,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    draft_model: str | Path | None = None,
    here: bool = False,
) -> Plan:
    """The bytes that a run takes at its peak, before anything is loaded; a released model need not be on this disk.

        memory_plan("phi-3.5-mini-4bit", 32_000, kv_bits=4).total

    `tokens`: prompt and answer together. `kv_bits` and `kv_group_size` as for `generate`. The plan is that of a Mac's
    GPU, with the smallest prefill chunk; of this machine if `here`. `draft_model` names one that drafts. Raises
    ModelNotFoundError, CheckpointError, ConfigError, and OptionError for a value of another type or outside its range.
    """
    workload = workload_named(name, revision, draft_model=draft_model, here=here)
    longest, tokens = workload.config.max_position_embeddings, whole(tokens, "tokens")
    if not 0 < tokens <= longest:
        raise OptionError(f"tokens={tokens:,} is outside 1 to {longest:,}, the model's context; give one inside")
    return replace(workload, length=tokens, bits=make_kv_bits(kv_bits, kv_group_size)).plan(0)


def longest_context(
    name: str | Path,
    memory: int | str,
    *,
    revision: str | None = None,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    draft_model: str | Path | None = None,
) -> int:
    """The most tokens, prompt and answer together, that fit a Mac sold with `memory` ("16GB"); 0 if none do.

    Within what Metal recommends to use, as `phi3-mlx plan` shows it. Raises what `memory_plan` raises.
    """
    within = mac_working_set(parse_size(memory, sold=True))
    workload = workload_named(name, revision, draft_model=draft_model)
    return replace(workload, bits=make_kv_bits(kv_bits, kv_group_size)).longest(within)


@dataclass(frozen=True)
class FamilyRow:
    """A line of the family table. Bytes of the weights at 4 bits; the longest context on Macs, by their gigabytes.

    The context is that of 4-bit weights with keys and values in floats, within what Metal recommends to use.
    """

    name: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    mmlu: float | None
    mt_bench: float | None
    mmlu_june: float | None
    bytes_4bit: int
    longest: dict[int, int]

    def cells(self) -> list[str]:
        """As tables show it; empty where nothing was published, "no" where the weights alone do not fit."""
        return [
            self.name,
            f"{self.parameters / 1e9:.1f}B",
            str(self.layers),
            str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}",
            f"{self.context:,}",
            "" if self.mmlu is None else f"{self.mmlu:.1f}",
            "" if self.mt_bench is None else f"{self.mt_bench:g}",
            size_text(self.bytes_4bit),
            *(f"{tokens:,}" if tokens else "no" for tokens in self.longest.values()),
        ]


def family_rows(macs: Sequence[int] = (16, 32)) -> list[FamilyRow]:
    """The family, as `phi3-mlx models` shows it, with the longest contexts on Macs of these sizes in gigabytes."""
    rows = []
    for name, member in MEMBERS.items():
        shape, parameters = member.shape, member.parameters
        size = packed_bytes(parameters, 4)
        longest = {gb: Workload.of_release(shape, size).longest(mac_working_set(gb * 2**30)) for gb in macs}
        rows.append(
            FamilyRow(
                name,
                parameters,
                shape.num_hidden_layers,
                shape.num_attention_heads,
                shape.num_key_value_heads,
                shape.max_position_embeddings,
                member.mmlu,
                member.mt_bench,
                member.mmlu_june,
                size,
                longest,
            )
        )
    return rows
