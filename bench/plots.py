"""The pictures of results, beside their files in results/."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def peaks(results: list[dict[str, Any]], path: Path) -> None:
    """The peaks of all results against the length, with the plan's and the cache's own bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = {(row["package"], row["tokens"]): row for result in results for row in result["rows"]}
    lengths = {package: sorted(tokens for name, tokens in rows if name == package) for package, _ in rows}
    for package, key, style in (
        ("mlx-lm", "peak", "o-C1"),
        ("phi3-mlx", "peak", "o-C0"),
        ("phi3-mlx", "planned", "--C0"),
        ("phi3-mlx", "cache", ":C0"),
    ):
        if tokens := lengths.get(package):
            label = {"peak": package, "planned": "phi3-mlx, as planned", "cache": "keys and values alone"}[key]
            axes.plot([n / 1000 for n in tokens], [rows[package, n][key] / 1e6 for n in tokens], style, label=label)
    layers, bits = results[0]["layers"], results[0]["bits"]
    axes.set(
        xlabel="thousand tokens",
        ylabel="peak memory, MB",
        title=f"Reading a long prompt: {layers} layers of Phi-3-mini's heads, {bits}-bit keys and values",
    )
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def curves(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """KL divergence against bits per weight, a curve a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["bits_per_weight"], row["kl"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(yscale="log", xlabel="bits per weight, scales included", ylabel="KL divergence, nats a token", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
