"""phi3-mlx models"""

from __future__ import annotations

import dataclasses
import shutil

import click

from .terminal import show, show_json

_SOURCES = (
    "MMLU: percent, 5-shot, from each model's card (phi-4: as OpenAI's simple-evals asks). MT-BENCH: technical report, "
    "arXiv 2404.14219. {june} 4-BIT: size of the weights. 16 GB, 32 GB: longest context on such a Mac (phi3-mlx plan)."
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def models(as_json: bool) -> None:
    """Show the family, the models known by a short name, and what is on this disk.

    A name in the first column works wherever a command takes -m; so does any directory or Hugging Face repository of
    a Phi-3 model. What is not on this disk is downloaded on first use.
    """
    from ..engine.capacity import family_rows
    from ..sizes import size_text
    from ..store.family import june_text
    from ..store.hub import list_models
    from .tables import print_table

    family, rows = family_rows(), list_models()
    if as_json:
        named = [dataclasses.asdict(row) | {"path": str(row.path) if row.path else None} for row in rows]
        show_json({"family": [dataclasses.asdict(row) for row in family], "models": named}, indent=2)
        return
    header = ["FAMILY", "PARAMETERS", "LAYERS", "HEADS", "CONTEXT", "MMLU", "MT-BENCH", "4-BIT", "16 GB", "32 GB"]
    print_table([header, *(row.cells() for row in family)], right=range(1, len(header)), spare=(2, 3, 6))
    show(f"\n{click.wrap_text(_SOURCES.format(june=june_text()), min(100, shutil.get_terminal_size().columns))}\n")
    table = [["NAME", "REPOSITORY", "BITS", "SIZE", "CONTEXT", "ON DISK"]]
    for row in rows:
        place = "bundled" if row.name == "tiny" else "yes" if row.path else ""
        table.append([row.name, row.repo_id or "", str(row.bits), size_text(row.bytes), f"{row.context:,}", place])
    print_table(table, right=range(2, 5), spare=(1,))
