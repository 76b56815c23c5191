"""phi3-mlx fuse"""

from __future__ import annotations

import click

from ..conversion.options import FuseOptions
from .declare import options_of
from .options import within_memory
from .progress import ConversionProgress, kept_when_stopped
from .reading import read_calibration, read_input
from .terminal import say

_FOLDERS = (
    click.option("--adapter", required=True, metavar="DIR", help="The folder of the adapter."),
    click.option("-o", "--output", required=True, metavar="DST", help="The model directory to write."),
)


@click.command()
@options_of(
    "options",
    FuseOptions,
    before={"dequantize": _FOLDERS, "force": [within_memory]},
    then={"calibration": read_calibration, "text": read_input},
)
def fuse(adapter: str, output: str, options: FuseOptions) -> None:
    """Merge an adapter into its model.

    Into floats the adapter goes exactly. Into packed weights it may be rounded away, so how much of it is left is
    measured on a text, and said.

    \b
    phi3-mlx fuse --adapter adapter -o fused
    phi3-mlx fuse --adapter adapter -o fused --dequantize
    phi3-mlx fuse --adapter adapter -o fused --method gptq --calibration self
    """
    from ..conversion import fuse as work

    with kept_when_stopped(output, options.method), ConversionProgress() as bar:
        done = work.fuse_as(adapter, output, options, bar.update)
    kind = "packed" if done.packed else "in floats"
    say(f"{done.layers:,} weight matrices changed; the model is in {done.path}, {kind}")
    if done.gain is not None:
        before, after = done.gain.held_before, done.gain.held_after
        say(f"training took the KL divergence on text held out from {before:.5f} to {after:.5f} nats a token")
    if done.survived is not None:
        seen = ", on a text that the weights were fitted to: another one says more" if done.seen else ""
        say(f"{max(0.0, done.survived):.0%} of the adapter's effect survived quantization{seen}")
        if done.survived < work.ENOUGH:
            say(
                "warning: this is not the model you trained; keep the adapter beside the base (--adapter), or fuse "
                "with --dequantize, with --bits 8 for the changed layers, or with --method gptq or distill"
            )
