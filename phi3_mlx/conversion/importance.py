"""How much each input of a linear layer counts: the mean square of what a text sends through it.

An error in a column of a weight matrix moves the output by that error times the input, so its square counts as often as
the input's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import PromptError
from .layerwise import EMBEDDING, LayerStream
from .texts import windows

if TYPE_CHECKING:
    from .sources import Source

_IMPORTANCE_WINDOW = 512
_IMPORTANCE_TOKENS = 4096  # of the text that are read, at most


def input_importance(
    source: Source, ids: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> dict[str, mx.array]:
    """By the name of each linear layer's weight, the mean squares of its inputs: (matrices, width) float32.

    A layer has one matrix, or one an expert; an expert that no token of the text reaches gets those of all. A tied
    head is left out, since it is the embedding, whose rows are looked up. A layer of the source is in memory at a time.
    Raises PromptError for an empty text.
    """
    if not ids:
        raise PromptError("the text that says which errors count is empty; give another, or importance=False")
    stream = LayerStream(source)
    length = min(_IMPORTANCE_WINDOW, source.config.max_position_embeddings, len(ids))
    hidden = stream.embed(windows(ids[:_IMPORTANCE_TOKENS], length))
    result: dict[str, mx.array] = {}
    for i in range(source.config.num_hidden_layers):
        layer = stream.layer(i)
        sums: dict[str, list[tuple[int, mx.array]]] = {}
        after = []
        for seen, part in stream.trace(layer, hidden):
            after.append(part)
            for path, inputs in seen.items():
                now = [(len(x), mx.sum(x * x, axis=0)) for x in inputs]
                before = sums.get(path)
                sums[path] = (
                    now if before is None else [(n + m, a + b) for (n, a), (m, b) in zip(before, now, strict=True)]
                )
        for path, parts in sums.items():
            result[f"model.layers.{i}.{path}.weight"] = _means(parts)
        mx.eval(result)
        hidden = mx.concatenate(after)
        del layer
        mx.clear_cache()
        if progress is not None:
            progress(i + 1, source.config.num_hidden_layers)
    if stream.head_path != EMBEDDING:
        normed = stream.norm(hidden).flatten(0, -2)
        result[f"{stream.head_path}.weight"] = mx.mean(normed * normed, axis=0)[None]
        mx.eval(result)
    return result


def _means(parts: Sequence[tuple[int, mx.array]]) -> mx.array:
    whole = sum((total for _, total in parts), mx.zeros_like(parts[0][1])) / max(1, sum(count for count, _ in parts))
    return mx.stack([total / count if count else whole for count, total in parts])
