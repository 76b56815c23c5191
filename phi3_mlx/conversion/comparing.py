"""Two checkpoints on a text, layer by layer side by side: a layer of each in memory, and the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from ..evaluation.quality import Comparison, Difference, blocks
from .layerwise import LayerStream

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .sources import Source

_COMPARED_TOKENS = 4096  # of the text that are read, at most


def compare_sources(
    a: Source,
    b: Source,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """How far the model of `b` is from that of `a`, in float32, on the text's first 4,096 tokens.

    Both have the vocabulary of `tokenizer` and the same layers. `progress` counts layers.
    """
    ids = tokenizer.encode(text)[:_COMPARED_TOKENS]
    bos = tokenizer.bos_token_id if tokenizer.add_bos_token else None
    read = list(blocks(ids, min(window, a.config.max_position_embeddings), bos))
    streams = [LayerStream(source) for source in (a, b)]
    hidden = [[stream.embed(block[:, :-1]) for block in read] for stream in streams]
    layers = a.config.num_hidden_layers
    for i in range(layers):
        for n, stream in enumerate(streams):
            layer = stream.layer(i)
            hidden[n] = [stream.run(layer, block) for block in hidden[n]]
            del layer
            mx.clear_cache()
        if progress is not None:
            progress(i + 1, layers)
    weights = [stream.source.read(f"{stream.head_path}.weight").astype(mx.float32) for stream in streams]
    heads = [stream.head(weight) for stream, weight in zip(streams, weights, strict=True)]
    difference = Difference()
    for block, *ends in zip(read, *hidden, strict=True):
        normed = [stream.norm(end) for stream, end in zip(streams, ends, strict=True)]
        targets = block[:, 1:].flatten()
        difference.add(normed[0], heads[0], normed[1], heads[1], targets, a.config.vocab_size)
    return difference.result(max(1, len(tokenizer.decode(ids))))
