"""From an empty terminal to the first token: whole processes, phi3-mlx and mlx-lm in turn on the same directory.

python -m bench coldstart [--model DIR] [--runs N]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click

from phi3_mlx import resolve

from . import record

PROMPT = "Tell me a story about a duck and a frog."


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=record.offline(), capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--model", default="tiny", show_default=True)
@click.option("--runs", default=7, show_default=True)
def main(model: str, runs: int) -> None:
    directory = str(resolve(model))
    common = ["--model", directory, "--prompt", PROMPT, "--max-tokens", "1"]
    commands = {
        "phi3-mlx": [sys.executable, "-c", "from phi3_mlx.cli import main; main()", "generate", *common],
        "mlx-lm": [sys.executable, "-m", "mlx_lm", "generate", *common],
        "phi3-mlx --help": [sys.executable, "-c", "from phi3_mlx.cli import main; main()", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            taken = seconds(command)
            if run:  # the first fills the disk cache
                times[name].append(taken)
    figures = {name: record.spread(values) for name, values in times.items()}
    ratio = figures["phi3-mlx"]["median"] / figures["mlx-lm"]["median"]
    for name, figure in figures.items():
        click.echo(f"{name:16} {figure['median']:6.2f} s   ({figure['min']:.2f} to {figure['max']:.2f})")
    click.echo(f"phi3-mlx / mlx-lm: {ratio:.2f}")
    rows = [{"command": name, "seconds": figure} for name, figure in figures.items()]
    record.write("coldstart", rows, "mlx", "mlx-lm", "transformers", model=os.path.basename(directory), ratio=ratio)


if __name__ == "__main__":
    main()
