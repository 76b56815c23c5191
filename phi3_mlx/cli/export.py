"""phi3-mlx export"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from ..conversion.options import ExportOptions
from .declare import options_of
from .options import in_options
from .progress import ConversionProgress
from .reading import read_input
from .terminal import note, say

if TYPE_CHECKING:
    from ..conversion.export import Exported


_ADAPTER_ONLY = click.option("--adapter-only", is_flag=True, help="Write the adapter alone, for llama-cli --lora.")


@click.command()
@click.option("-m", "--model", metavar="NAME", help="The model; by default the one that the adapter names.")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .gguf file to write.")
@options_of(
    "options",
    ExportOptions,
    before={"type": [_ADAPTER_ONLY]},
    then={"calibration": read_input, "text": read_input},
)
def export(model: str | None, output: str, adapter_only: bool, options: ExportOptions) -> None:
    """Write a model as a GGUF file, for llama.cpp and ollama.

    NAME is a name of `phi3-mlx models`, a directory, a Hugging Face repository (OWNER/REPO) or a GGUF file, packed or
    not. FILE appears when it is complete.

    \b
    phi3-mlx export -m tiny -o tiny.gguf
    phi3-mlx export -m phi-3.5-mini -o mini.gguf --type q4_k_m
    phi3-mlx export --adapter adapter -o mine.gguf
    phi3-mlx export --adapter adapter --adapter-only -o adapter.gguf --modelfile
    """
    if adapter_only:
        _export_adapter(model, output, options)
        return
    from ..conversion.export import export_as

    with ConversionProgress() as bar:
        done = export_as(model, output, options, progress=bar.update)
    _describe(done)


def _export_adapter(model: str | None, output: str, options: ExportOptions) -> None:
    from ..conversion.export_adapter import export_adapter

    if options.adapter is None:
        raise click.UsageError("--adapter-only needs --adapter DIR")
    for name in ("name", "split_max_size", "calibration", "report", "text"):
        if getattr(options, name) is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} is of whole models; leave it out with --adapter-only")
    if not options.importance:
        raise click.UsageError("--no-importance is of whole models; leave it out with --adapter-only")
    kind: Any = options.type or "f32"
    done = export_adapter(
        options.adapter,
        output,
        model=model,
        revision=options.revision,
        type=kind,
        modelfile=options.modelfile,
        longrope=options.longrope,
        force=options.force,
    )
    beside = f"; {done.modelfile.name} lies beside it" if done.modelfile else ""
    say(f"{done.path}: {done.layers:,} layers changed{beside}")


def _describe(done: Exported) -> None:
    from ..sizes import size_text

    for sentence in done.notes:
        note(in_options(sentence, click.get_current_context().command))
    if (measured := done.comparison) is not None and measured.kl is not None and measured.top1 is not None:
        say(f"beside the model: KL {measured.kl:.2g} nats a token, the same likeliest token at {measured.top1:.1%}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.kinds.items()))
    parts = f" to {done.files[-1].name}" if len(done.files) > 1 else ""
    say(f"{done.files[0]}{parts}: {size_text(done.bytes)}, {done.bits_per_weight:.2f} bits a weight; matrices: {kinds}")
    if done.modelfile:
        say(f"ollama create NAME -f {shlex.quote(str(done.modelfile))}")
