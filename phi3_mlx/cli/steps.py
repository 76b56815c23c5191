"""What the commands of `phi3-mlx data` have in common: their files, and what they say once they are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..data.options import ReadOptions, WorkOptions, WriteOptions
from .declare import options_of
from .progress import DataProgress
from .terminal import note, say

if TYPE_CHECKING:
    from ..data.records import Advance

files_argument = click.argument("files", nargs=-1, required=True, metavar="FILE...")
output_option = click.option(
    "-o", "--output", required=True, metavar="DIR", help="The folder to write; it appears when it is complete."
)
reading_options = options_of("read", ReadOptions)
writing_options = options_of("write", WriteOptions)
working_options = options_of("work", WorkOptions)


def run_step(output: str, step: Callable[[Callable[[Advance], None]], dict[str, Any]]) -> dict[str, Any]:
    """Run a step under a bar, and say what it did; its report."""
    with DataProgress("reading") as bar:
        report = step(bar.update)
    note_broken(report["broken"])
    for reason, removed in report.get("reasons", {}).items():
        say(f"removed {removed['records']:,}: {reason}")
    for rule, made in report.get("line_rules", {}).items():
        say(f"lines taken out of texts: {made['lines']:,}: {rule}")
    for pattern, made in report.get("pii", {}).items():
        say(f"found {made['found']:,} in {made['records']:,} records: {pattern}")
    for name, kept in report.get("outputs", {}).items():
        tokens = f", {kept['tokens']:,} tokens" if "tokens" in kept else ""
        say(f"{output}/{name}: {kept['records']:,} records, {kept['characters']:,} characters{tokens}")
    return report


def note_broken(broken: Mapping[str, Any]) -> None:
    """Say how many records a report counts as left out, and why the first was."""
    if broken["records"]:
        first = broken["samples"][0]
        note(f"records that could not be read: {broken['records']:,}; {first['source']}: {first['why']}")
