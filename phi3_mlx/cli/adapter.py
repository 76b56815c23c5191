"""phi3-mlx adapter"""

from __future__ import annotations

import click

from ..conversion.options import FuseOptions
from .declare import fields_of, option_of
from .options import revision_option
from .terminal import say


@click.group()
def adapter() -> None:
    """Import adapters from PEFT, or export to it."""


@adapter.command("import")
@click.argument("source", metavar="SRC")
@click.option("-m", "--model", required=True, metavar="NAME", help="The model that it was trained on.")
@revision_option
@click.option("-o", "--output", required=True, metavar="DIR", help="The adapter folder to write.")
def take(source: str, model: str, revision: str | None, output: str) -> None:
    """Turn what PEFT has saved into an adapter.

    Its projections may be fused or split; LoRA, rsLoRA, DoRA, PiSSA or OLoRA.

    \b
    phi3-mlx adapter import peft-adapter -m phi-3.5-mini -o adapter
    """
    from ..adapters.peft import import_peft

    count = import_peft(source, output, model, revision=revision)
    say(f"{count:,} layers changed; the adapter is in {output}")


@adapter.command("export")
@click.argument("source", metavar="SRC")
@option_of(fields_of(FuseOptions)["model"])
@revision_option
@click.option("-o", "--output", required=True, metavar="DIR", help="The PEFT folder to write.")
@click.option("--split", is_flag=True, help="For models that have q, k, v, gate and up apart.")
def give(source: str, model: str | None, revision: str | None, output: str, split: bool) -> None:
    """Turn an adapter into what PEFT loads.

    \b
    phi3-mlx adapter export adapter -o peft-adapter
    """
    from ..adapters.peft import export_peft

    count = export_peft(source, output, model=model, revision=revision, split=split)
    say(f"{count:,} layers changed; PEFT's folder is {output}")
