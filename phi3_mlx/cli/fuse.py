"""phi3-mlx fuse"""

from __future__ import annotations

from typing import Any

import click

from .options import dtype_option, revision_option, within_memory
from .reading import read_input
from .terminal import say


@click.command()
@click.option("-m", "--model", metavar="NAME", help="The model it was trained on; by default as the adapter names it.")
@revision_option
@click.option("--adapter", required=True, metavar="DIR", help="The folder of the adapter.")
@click.option("-o", "--output", required=True, metavar="DST", help="The model directory to write.")
@click.option("--dequantize", is_flag=True, help="Write floats: all of the adapter is kept.")
@dtype_option("Type of the floats. Without it: the model's own.")
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Quantize the changed layers to this many bits. Without it: as they were.",
)
@click.option("--text", metavar="FILE", help="The text that the measurement reads. Without it: a sample.")
@within_memory
@click.option(
    "--force", is_flag=True, help="Go on where DST exists already (it is replaced) or there is too little memory."
)
def fuse(adapter: str, output: str, bits: str | None, text: str | None, **options: Any) -> None:
    """Merge an adapter into its model.

    Into floats the adapter goes exactly. Into packed weights it may be rounded away, so how much of it is left is
    measured on a text, and said.

    \b
    phi3-mlx fuse --adapter adapter -o fused
    phi3-mlx fuse --adapter adapter -o fused --dequantize
    """
    from ..conversion import fuse as work

    sample = read_input(text) if text else None
    done = work.fuse(adapter, output, bits=int(bits) if bits else None, text=sample, **options)
    kind = "packed" if done.packed else "in floats"
    say(f"{done.layers:,} weight matrices changed; the model is in {done.path}, {kind}")
    if done.survived is not None:
        say(f"{max(0.0, done.survived):.0%} of the adapter's effect survived quantization")
        if done.survived < work.ENOUGH:
            say(
                "warning: this is not the model you trained; keep the adapter beside the base (--adapter), or fuse "
                "with --dequantize, or with --bits 8 for the changed layers"
            )
