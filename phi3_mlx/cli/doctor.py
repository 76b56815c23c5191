"""phi3-mlx doctor"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from .terminal import show, show_json

_STYLES: dict[str, dict[str, Any]] = {
    "ok": {"fg": "green"},
    "note": {"fg": "yellow"},
    "wrong": {"fg": "red", "bold": True},
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: Python, MLX and its device, memory, disk, packages.

    Every line is ok, a note, or wrong, and says below what to type. The exit status is 1 if something is wrong. It
    works where MLX does not.
    """
    from .. import __version__
    from ..doctor.checks import examine, report
    from ..doctor.facts import look

    findings = examine(look())
    wrong = sum(finding.status == "wrong" for finding in findings)
    if as_json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        show_json({"phi3_mlx": __version__, "wrong": wrong, "checks": checks}, indent=2)
    else:
        around = {status: click.style("\0", **style).split("\0") for status, style in _STYLES.items()}
        text = report(findings, lambda status: f"{status:6}".join(around[status]))
        show(text, styles={sequence for pair in around.values() for sequence in pair})
    ctx.exit(1 if wrong else 0)
