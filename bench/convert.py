"""Memory and time of a conversion to 4 bits: phi3-mlx and mlx-lm in turn, each run a process of its own.

    python -m bench convert [--layers N] [--runs N]

The checkpoint has Phi-3-mini's shapes in bfloat16 and random values, and is made on the spot: 0.4 GB and 0.23 GB for
every layer. Memory is the largest resident set of the process, time that of the whole process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import click

from . import record
from .models import PHI_3_MINI

_OURS = ["-c", "from phi3_mlx.cli import main; main()", "convert"]
_SCALE = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def make_checkpoint(directory: Path, layers: int) -> None:
    """A bfloat16 checkpoint of Phi-3-mini's shapes, with the bundled model's tokenizer (mlx-lm asks for one)."""
    import mlx.core as mx

    from phi3_mlx import resolve
    from phi3_mlx.conversion.layout import Entry, Layout
    from phi3_mlx.conversion.sources import tensor_of
    from phi3_mlx.conversion.writer import DirectorySink
    from phi3_mlx.models import parse_config, shapes

    config = {**PHI_3_MINI, "num_hidden_layers": layers}
    entries = (Entry(name, tensor_of("BF16", shape)) for name, shape in shapes(parse_config(config)).items())

    def random(entry: Entry) -> list[mx.array]:
        shape = entry.tensor.shape
        return [(mx.random.normal(shape, scale=0.02) + (len(shape) == 1)).astype(mx.bfloat16)]

    directory.mkdir()
    DirectorySink(directory).write(Layout(tuple(entries), None), random)
    (directory / "config.json").write_text(json.dumps(config))
    for file in resolve("tiny").glob("tokenizer*"):
        shutil.copy(file, directory)


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=record.offline())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise click.ClickException(f"{' '.join(command)} failed: {output.read().decode()[-500:]}")
    return seconds, usage.ru_maxrss * _SCALE


@click.command(help=__doc__)
@click.option("--layers", default=8, show_default=True, help="Phi-3-mini has 32; 8 make 2.2 GB.")
@click.option("--runs", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a temporary folder without it.")
def main(layers: int, runs: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, target = Path(work, "source"), Path(work, "target")
        # In another process: what a parent has held counts as its children's peak.
        maker = get_context("spawn").Process(target=make_checkpoint, args=(source, layers))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise click.ClickException("the checkpoint could not be made")
        size = (source / "model.safetensors").stat().st_size
        theirs = ["-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(target), "-q"]
        commands = {
            "phi3-mlx": [sys.executable, *_OURS, str(source), "-o", str(target), "--no-report"],
            "mlx-lm": [sys.executable, *theirs],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(runs + 1):
            for name, command in commands.items():
                taken, peak = measure(command)
                shutil.rmtree(target)
                if run:  # the first fills the disk cache
                    seconds[name].append(taken)
                    peaks[name].append(peak)
    rows = [
        {"package": name, "seconds": record.spread(seconds[name]), "peak_bytes": record.spread(peaks[name])}
        for name in commands
    ]
    for name in commands:
        taken_, peak_ = record.spread(seconds[name]), record.spread(peaks[name])
        click.echo(
            f"{name:9} {taken_['median']:7.1f} s   ({taken_['min']:.1f} to {taken_['max']:.1f})   peak "
            f"{peak_['median'] / 1e9:.2f} GB"
        )
    ratios = {
        kind: record.spread(values["phi3-mlx"])["median"] / record.spread(values["mlx-lm"])["median"]
        for kind, values in (("time", seconds), ("memory", peaks))
    }
    click.echo(f"phi3-mlx / mlx-lm: time {ratios['time']:.2f}, memory {ratios['memory']:.2f}")
    record.write("convert", rows, "mlx", "mlx-lm", layers=layers, source_bytes=size, ratios=ratios)


if __name__ == "__main__":
    main()
