"""phi3-mlx doctor"""

from __future__ import annotations

import dataclasses
import json

import click

_COLORS = {"ok": "green", "note": "yellow", "wrong": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: Python, MLX and its device, memory, disk, packages.

    Every line is ok, a note, or wrong, and says below what to type. The exit status is 1 if something is wrong. It
    works where MLX does not.
    """
    from .. import __version__
    from ..doctor import examine, look, report

    findings = examine(look())
    wrong = sum(finding.status == "wrong" for finding in findings)
    if as_json:
        facts = {"phi3_mlx": __version__, "wrong": wrong, "checks": [dataclasses.asdict(one) for one in findings]}
        click.echo(json.dumps(facts, indent=2))
    else:

        def colored(status: str) -> str:
            return click.style(f"{status:6}", fg=_COLORS[status], bold=status == "wrong")

        click.echo(report(findings, colored))
    ctx.exit(1 if wrong else 0)
