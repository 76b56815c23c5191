"""Contenders measured in turn, and the rows of a result that set them side by side."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

import click
import mlx.core as mx

from phi3_mlx import blas
from phi3_mlx.engine.prefill import common_length

from . import record


def in_turn(contenders: Mapping[str, Callable[[], float]], runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Each contender's tokens a second, and its peak of MLX's memory less what was held before (the weights).

    Measured alternately; a first round warms up.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, contender in contenders.items():
            gc.collect()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            figure = contender()
            if run:
                figures[name].append(figure)
                peaks[name].append(mx.get_peak_memory() - held)
    return {
        name: {"tokens_per_second": record.spread(figures[name]), "peak_memory": record.spread(peaks[name])}
        for name in contenders
    }


_Result = TypeVar("_Result")


def apart(call: Callable[..., _Result], *args: Any) -> _Result:
    """What `call(*args)` gives in a process of its own, without the BLAS that this package loads: for PyTorch.

    In one process PyTorch's products go there as well, and the threads of both wait for each other by turning in
    circles: transformers was five times slower than alone.
    """
    with patch.dict(os.environ, {blas.VARIABLE: "off"}):
        os.environ.pop("LD_PRELOAD", None)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(call, *args).result()


def rows_of(
    case: str, name: str, figures: dict[str, dict[str, dict[str, float]]], base: str = "mlx-lm", **facts: Any
) -> list[dict[str, Any]]:
    """A case's rows, one a contender, each with its speed over that of `base`."""
    click.echo(name)
    rows = []
    for package, measured in figures.items():
        figure, peak = measured["tokens_per_second"], measured["peak_memory"]["median"]
        ratio = figure["median"] / figures[base]["tokens_per_second"]["median"]
        ends = f"({figure['min']:.2f} to {figure['max']:.2f})"
        click.echo(f"  {package:22} {figure['median']:9.2f} tok/s   {ends}   {ratio:.2f}x   peak {peak / 1e6:,.1f} MB")
        rows.append({"case": case, "model": name, "package": package, **measured, "ratio": ratio, **facts})
    return rows


def alike(some: list[list[int]], others: list[list[int]]) -> float:
    """The share of the tokens of answers that stand before the first that is not the same in the other answers."""
    same = sum(common_length(a, b) for a, b in zip(some, others, strict=True))
    return same / sum(map(len, some))
