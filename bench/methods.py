"""The tables of quantization: KL divergence by size and method, and what each method takes."""

from __future__ import annotations

import math
from typing import Any

from .published import read_all, sources

_CURVE = "mixed"  # a method that a curve over all sizes has


def quantization() -> str:
    """KL divergence by method at the sizes of uniform 3 and 4 bits, for every model with a curve."""
    results = [result for result in read_all("quantization") if _CURVE in _methods_of(result)]
    methods = list(dict.fromkeys(method for result in results for method in _methods_of(result)))
    widths = {
        result["model"]: sorted(row["bits_per_weight"] for row in result["rows"] if row["method"] == "uniform")[1:3]
        for result in results
    }
    columns = [f"{model}, {width:.1f} bits a weight" for model, sizes in widths.items() for width in sizes]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for method in methods:
        cells = []
        for result in results:
            for width in widths[result["model"]]:
                found = [
                    (abs(row["bits_per_weight"] - width), row["kl"])
                    for row in result["rows"]
                    if row["method"] == method and "kl" in row
                ]
                off, kl = min(found, default=(math.inf, 0.0))
                cells.append(f"{kl:.4f}" if off < 0.01 else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    pictures = [f"![KL against bits](../bench/results/{result['name']}.png)" for result in results]
    return "\n".join([*lines, "", *pictures, "", sources(results)])


def methods() -> str:
    """What each method loses, and the time and memory that it takes."""
    results = [result for result in read_all("quantization") if any("cpu_seconds" in row for row in result["rows"])]
    if not results:
        return "Not measured yet."
    lines = ["| model | method | tokens read | bits a weight | KL, nats | same choice | processor's time | peak |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for result in results:
        lines += [f"| {result['model']} | {' | '.join(_costs(row, result))} |" for row in result["rows"]]
    return "\n".join([*lines, "", sources(results)])


def _costs(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    size = f"{row['bits_per_weight']:.2f}"
    if "refused" in row:
        return [f"{row['method']}: {row['refused']}", "", size, "", "", "", ""]
    read = "" if row["method"] in ("uniform", "mlx-lm uniform") else f"{result['calibration_tokens']:,}"
    seconds, peak = f"{row['cpu_seconds']:,.0f} s", f"{row['peak_memory'] / 1e6:,.0f} MB"
    return [row["method"], read, size, f"{row['kl']:.4f}", f"{row['top1']:.1%}", seconds, peak]


def _methods_of(result: dict[str, Any]) -> list[str]:
    return [row["method"] for row in result["rows"]]
