"""The published results, and how their figures and sources are written."""

from __future__ import annotations

from functools import cache
from typing import Any

import click

from . import record


@cache
def systems() -> dict[str, dict[str, dict[str, Any]]]:
    """The results of each system, first of that which most was measured on."""
    return record.read_systems(record.PUBLISHED)


def main_system() -> dict[str, dict[str, Any]]:
    """The results, by name, from the system that most was measured on."""
    return next(iter(systems().values()))


def named(name: str, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of some results the bench's own and those of other models or lengths."""
    return [result for other, result in results.items() if other == name or other.startswith(f"{name}-")]


def read_all(name: str) -> list[dict[str, Any]]:
    """The bench's results from the main system. ClickException if there are none."""
    results = named(name, main_system())
    if not results:
        raise click.ClickException(f"nothing was measured yet; run python -m bench {name}")
    return results


def read(name: str) -> dict[str, Any]:
    """The first of them."""
    return read_all(name)[0]


def sources(results: list[dict[str, Any]]) -> str:
    """Machine, versions and commands of results."""
    lines = []
    for machine in dict.fromkeys(result["machine"] for result in results):
        here = [result for result in results if result["machine"] == machine]
        newest: dict[str, str] = {}
        for result in here:
            newest |= result["versions"]
        commands = ", ".join(dict.fromkeys(f"`{result['command']}` ({result['date']})" for result in here))
        lines.append(f"{machine}; {', '.join(f'{name} {number}' for name, number in newest.items())}. {commands}.")
    return " ".join(lines)


def scaled(figure: dict[str, float], unit: float) -> dict[str, float]:
    """A figure in another unit."""
    return {key: value / unit for key, value in figure.items()}


def shown(figure: dict[str, float], unit: str) -> str:
    """A figure as tables have it: its median, and least and most where it was measured more than once."""
    digits = 0 if figure["median"] >= 100 else 2
    median, least, most = (f"{figure[key]:,.{digits}f}" for key in ("median", "min", "max"))
    once = figure["min"] == figure["max"]
    return f"{median} {unit}" if once else f"{median} {unit} ({least} to {most})"
