"""The tables of quantization: KL divergence by size and method, and what each method takes."""

from __future__ import annotations

import math
from typing import Any

import click

from .published import read_all, sources

_CURVE = "mixed"  # a method that a curve over all sizes has
_FLOATING = ("mxfp", "nvfp")  # how the names of MLX's floating formats begin


def quantization() -> str:
    """KL divergence by method at the sizes of uniform 3 and 4 bits, for every model with a curve."""
    results = _curves()
    methods = list(dict.fromkeys(method for result in results for method in _methods_of(result)))
    widths = [
        sorted(row["bits_per_weight"] for row in result["rows"] if row["method"] == "uniform")[1:3]
        for result in results
    ]
    columns = [
        f"{result['model']}, {width:.1f} bits a weight"
        for result, sizes in zip(results, widths, strict=True)
        for width in sizes
    ]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for method in methods:
        cells = []
        for result, sizes in zip(results, widths, strict=True):
            for width in sizes:
                found = [
                    (abs(row["bits_per_weight"] - width), row["kl"])
                    for row in result["rows"]
                    if row["method"] == method and "kl" in row
                ]
                off, kl = min(found, default=(math.inf, 0.0))
                cells.append(f"{kl:.4f}" if off < 0.01 else "")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    pictures = [f"![KL against bits](../bench/results/{result['name']}.png)" for result in results]
    return "\n".join([*lines, "", *pictures, "", sources(results)])


def formats() -> str:
    """KL divergence of other groups and of MLX's floating formats, beside the result's own groups, by size."""
    results = _measured([result for result in read_all("quantization") if _has_others(result)])
    lines = ["| model | method | bits a weight | KL, nats |", "|---|---|--:|--:|"]
    for result in results:
        alike = [row for row in result["rows"] if not row["method"].startswith(_CURVE) and "kl" in row]
        for row in sorted(alike, key=lambda row: (row["bits_per_weight"], -row["kl"])):
            groups = "" if _is_other(row["method"]) else f", groups of {result['group_size']}"
            size, kl = f"{row['bits_per_weight']:.2f}", f"{row['kl']:.4f}"
            lines.append(f"| {result['model']} | {row['method']}{groups} | {size} | {kl} |")
    return "\n".join([*lines, "", sources(results)])


def methods() -> str:
    """What each method loses, and the time and memory that it takes."""
    results = _measured_with("cpu_seconds")
    lines = ["| model | method | tokens read | bits a weight | KL, nats | same choice | processor's time | peak |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for result in results:
        lines += [f"| {result['model']} | {' | '.join(_costs(row, result))} |" for row in result["rows"]]
    return "\n".join([*lines, "", sources(results)])


def flipped() -> str:
    """How many questions the models of each method answer right, and how many of the source's answers flip."""
    results = _measured_with("answers")
    asked = [_asked(row) for result in results for row in result["rows"]]
    tasks = list(dict.fromkeys((task, of["questions"]) for answers in asked for task, of in answers.items()))
    columns = "".join(f" {task}, {questions} |" for task, questions in tasks)
    lines = [f"| model | method | bits a weight | KL, nats |{columns} lost | won |"]
    lines.append("|---|---|--:|--:|" + "--:|" * (len(tasks) + 2))
    for result in results:
        rows = [row for row in result["rows"] if _asked(row)]
        right = _shares(rows[0], "source_right", tasks)
        lines.append(f"| {result['model']} | its source |  | 0 | {right} |  |  |")
        for row in rows:
            lost, won = (sum(of[way] for of in _asked(row).values()) for way in ("lost", "won"))
            facts = row["method"], f"{row['bits_per_weight']:.2f}", f"{row['kl']:.4f}"
            right = _shares(row, "right", tasks)
            lines.append(f"| {result['model']} | {' | '.join(facts)} | {right} | {lost} | {won} |")
    return "\n".join([*lines, "", sources(results)])


def _curves() -> list[dict[str, Any]]:
    return [result for result in read_all("quantization") if _CURVE in _methods_of(result)]


def _measured_with(figure: str) -> list[dict[str, Any]]:
    """Results whose rows have this, but for curves and those of other groups, which have tables of their own."""
    results = [result for result in read_all("quantization") if any(figure in row for row in result["rows"])]
    return _measured([result for result in results if _CURVE not in _methods_of(result) and not _has_others(result)])


def _measured(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These results. ClickException if there are none: a page has no empty table."""
    if not results:
        raise click.ClickException("this was not measured yet; run python -m bench quantization")
    return results


def _has_others(result: dict[str, Any]) -> bool:
    return any(map(_is_other, _methods_of(result)))


def _is_other(method: str) -> bool:
    """Whether a method's name says its groups or its format."""
    return ", groups of " in method or method.startswith(_FLOATING)


def _asked(row: dict[str, Any]) -> dict[str, dict[str, int]]:
    answers: dict[str, dict[str, int]] = row.get("answers", {})
    return answers


def _shares(row: dict[str, Any], right: str, tasks: list[tuple[str, int]]) -> str:
    """The cells of a row, empty for a task that was not asked with as many questions."""
    answers = _asked(row)
    asked = [(answers.get(task, {"questions": 0}), questions) for task, questions in tasks]
    return " | ".join(f"{of[right] / questions:.1%}" if of["questions"] == questions else "" for of, questions in asked)


def _costs(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    size = f"{row['bits_per_weight']:.2f}"
    if "refused" in row:
        return [f"{row['method']}: {row['refused']}", "", size, "", "", "", ""]
    read = "" if row["method"] in ("uniform", "mlx-lm uniform") else f"{result['calibration_tokens']:,}"
    seconds, peak = f"{row['cpu_seconds']:,.0f} s", f"{row['peak_memory'] / 1e6:,.0f} MB"
    return [row["method"], read, size, f"{row['kl']:.4f}", f"{row['top1']:.1%}", seconds, peak]


def _methods_of(result: dict[str, Any]) -> list[str]:
    return [row["method"] for row in result["rows"]]
