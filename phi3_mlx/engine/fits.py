"""The family's table: the released models, and the longest context of each on a Mac."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sizes import size_text
from ..store.family import MEMBERS, packed_bytes
from .machine import mac_working_set
from .plan import Workload


@dataclass(frozen=True)
class FamilyRow:
    """A line of the family table. Bytes of the weights at 4 bits; the longest context on Macs, by their gigabytes.

    The context is that of 4-bit weights with unpacked keys and values, within what Metal recommends to use.
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
