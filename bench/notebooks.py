"""Run the notebooks from beginning to end, and keep or check what they print.

    python -m bench.notebooks [NAME...]            run them and save their outputs
    python -m bench.notebooks [NAME...] --check    run them and compare with what is saved

A check fails on an error and on text that differs. Numbers may differ by 2 %, because another processor adds in another
order. Pictures must be there, and are not compared; nor is any output of a cell with the tag "varies". What is saved is
of MLX's CPU backend: on a GPU, whose number type is another, only errors are looked for.
"""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import blas

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
VARIES = "varies"  # the tag of a cell whose text is never twice the same
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_PADDING = re.compile(r" +(?=[-+]?\d)")  # of a column, which 99.9 needs one more of than 100.0
_CLOSE, _SMALL = 0.02, 2e-3
_SECONDS = 600  # of a cell


def run(path: Path) -> Any:
    """The notebook, executed in a fresh kernel that works in its folder. Raises ClickException for a failing cell."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    # Frozen modules would make the debugger of the kernel complain.
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=_SECONDS, resources={"metadata": {"path": str(path.parent)}}, record_timing=False
    )
    try:
        # Notebooks import MLX before the package, as the linter sorts them: its BLAS must be there from the start.
        client.execute(env={**os.environ, **blas.environment()})
    except CellExecutionError as error:
        raise click.ClickException(f"{path.name} fails:\n{error}") from error
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}  # the rest says which Python ran it last
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one: how they are cut depends on the clock."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def differences(saved: Any, fresh: Any) -> list[str]:
    """What a reader of the saved notebook would not see; a line a cell."""
    found = []
    for number, (old, new) in enumerate(zip(saved.cells, fresh.cells, strict=True)):
        if new.cell_type != "code":
            continue
        if old.execution_count is None:
            found.append(f"cell {number} was never run")
        elif old.execution_count != new.execution_count:
            found.append(f"cell {number} was not run in order")
        elif VARIES not in new.metadata.get("tags", []):
            before, after = _shown(old.outputs), _shown(new.outputs)
            if not alike(before, after):
                found.append(f"cell {number} shows\n{after}\nand not\n{before}")
    return found


def alike(before: str, after: str) -> bool:
    """Whether two texts are the same but for numbers that are nearly so, and the spaces that set them in columns."""
    before, after = (_PADDING.sub(" ", text) for text in (before, after))
    if _NUMBER.sub("0", before) != _NUMBER.sub("0", after):
        return False
    numbers = [[float(one.replace(",", "")) for one in _NUMBER.findall(text)] for text in (before, after)]
    return all(math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_SMALL) for a, b in zip(*numbers, strict=True))


def _shown(outputs: list[Any]) -> str:
    parts = []
    for output in outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" in output.get("data", {}):
            parts.append("(a picture)")
        else:
            data = output.get("data", {})
            parts.append(str(data.get("text/markdown") or data.get("text/html") or data.get("text/plain")))
    return "\n".join(parts)


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Only say whether the saved outputs still hold.")
def main(names: tuple[str, ...], check: bool) -> None:
    import nbformat

    paths = [NOTEBOOKS / f"{name}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    stale = []
    comparable = mx.default_device().type == mx.DeviceType.cpu
    for path in paths:
        started = time.perf_counter()
        fresh = run(path)
        click.echo(f"{path.name}: {time.perf_counter() - started:.0f} s", err=True)
        if not check:
            nbformat.write(fresh, path)
            continue
        if comparable:
            found = differences(nbformat.read(path, as_version=4), fresh)
            stale += [f"{path.name}, {line}" for line in found]
    if stale:
        raise click.ClickException("\n".join([*stale, "", "if that is right: python -m bench.notebooks"]))


if __name__ == "__main__":
    main()
