"""Pictures with matplotlib (the extra `plot`): grids of values, and where heads look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..values import shown
from .coloured import numbers_of_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MISSING = 'a picture needs matplotlib; type pip install "phi3-mlx[plot]"'
_LABELS = 40  # along an axis: more would not be read
_INCHES, _SIDE_INCHES = 0.28, (3.0, 12.0)  # of a cell; the least and the most of a side


def draw_grid(
    values: mx.array | np.ndarray,
    *,
    rows: Sequence[object] | None = None,
    columns: Sequence[object] | None = None,
    label: str = "",
    largest: float | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Values (rows, columns) as colours, blue above 0 and red below, and the axes that they are drawn in.

    `rows` and `columns`: what to write beside them, None for their numbers; `label`: what the colours mean. `largest`:
    the value of the full colour, None for the largest there is. `axes`: matplotlib's, None for new ones. Raises
    OptionError for values that are no grid, or where matplotlib is missing.
    """
    grid = numbers_of_array(values)
    if grid.ndim != 2 or not grid.size:
        raise OptionError(f"values have shape {grid.shape}; expected (rows, columns)")
    for names, count, what in ((rows, len(grid), "rows"), (columns, grid.shape[1], "columns")):
        if names is not None and len(names) != count:
            raise OptionError(f"{len(names)} names are given for {count} {what}")
    axes = _new_axes(grid.shape) if axes is None else axes
    top = largest or float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    _name(axes, rows, grid.shape[0], "y")
    _name(axes, columns, grid.shape[1], "x")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    return axes


def draw_attention(
    pattern: mx.array | np.ndarray,
    tokens: Sequence[str] | None = None,
    *,
    queries: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Where a head looks: probabilities (queries, keys), darker for more, and the axes that they are drawn in.

    `tokens`: the texts of the keys. `queries`: those of the queries, None for the last of the keys. `axes`:
    matplotlib's, None for new ones. Raises OptionError for what is no pattern of one head, or where matplotlib is
    missing.
    """
    grid = numbers_of_array(pattern)
    if grid.ndim != 2 or not grid.size:
        raise OptionError(f"pattern is {shown(pattern)} of shape {grid.shape}; give that of one head, (queries, keys)")
    if tokens is not None and len(tokens) != grid.shape[1]:
        raise OptionError(f"{len(tokens)} tokens are given for {grid.shape[1]} keys")
    if queries is None and tokens is not None:
        queries = tokens[-len(grid) :]
    axes = _new_axes(grid.shape) if axes is None else axes
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    _name(axes, queries, grid.shape[0], "y")
    _name(axes, tokens, grid.shape[1], "x")
    axes.grid(False)
    axes.set(xlabel="looks at", ylabel="from")
    return axes


def _new_axes(shape: tuple[int, ...]) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise OptionError(_MISSING) from error
    height, width = (min(max(_INCHES * count, _SIDE_INCHES[0]), _SIDE_INCHES[1]) for count in shape)
    _, axes = plt.subplots(figsize=(width + 1.5, height), layout="constrained")
    return axes


def _name(axes: Axes, names: Sequence[object] | None, count: int, axis: str) -> None:
    """Names at the middle of cells; of many the first of each few."""
    step = -(-count // _LABELS)
    places = range(0, count, step)
    # A dollar sign would begin a formula.
    texts = [str(place if names is None else names[place]).replace("$", r"\$").replace("\n", "↵") for place in places]
    if axis == "y":
        axes.set_yticks(places, texts)
    else:
        axes.set_xticks(places, texts, rotation=90 if max(map(len, texts)) > 3 else 0)
