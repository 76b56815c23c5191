"""A source's model run layer by layer: one layer of weights in memory at a time, beside the activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..models import build
from ..models.attention import make_mask
from ..models.decoder import Model
from ..models.experts import Groups
from ..models.layer import DecoderLayer

if TYPE_CHECKING:
    from .sources import Source

Traced = dict[str, list[mx.array]]  # by the path of a linear layer: the inputs of each of its matrices

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOKENS_AT_ONCE = 4096


class LayerStream:
    """Reads `source` layer by layer and runs activations (rows, length, hidden_size) through it, in float32.

    Every row is a sequence of its own that begins at position 0.
    """

    def __init__(self, source: Source):
        self.source = source
        self.config = source.config
        self._model = build(self.config)  # random weights, never computed: those that are used are replaced

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a decoder layer, in the order of use."""
        return tuple(self.config.linears)

    @property
    def head_path(self) -> str:
        """The path of the layer that makes logits."""
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    def embed(self, ids: mx.array) -> mx.array:
        """ids (rows, length) -> (rows, length, hidden_size)."""
        return self.embedded(self.source.read(f"{EMBEDDING}.weight")[ids])

    def embedded(self, rows: mx.array) -> mx.array:
        """The first layer's input from dequantized rows of the embedding; float32, evaluated."""
        hidden = self._model.model.embedded(rows.astype(mx.float32))
        mx.eval(hidden)
        return hidden

    def layer(self, i: int) -> DecoderLayer:
        """Decoder layer `i` with the source's weights."""
        layer = self._model.model.make_layer(i)
        prefix = f"model.layers.{i}."
        names = [name for name in self.source.tensors if name.startswith(prefix)]
        layer.load_weights([(name.removeprefix(prefix), self.source.read(name).astype(mx.float32)) for name in names])
        mx.eval(layer.parameters())
        return layer

    def norm(self, hidden: mx.array) -> mx.array:
        """The norm after the last layer."""
        return self._tail.model.last_norm(hidden)

    def logits(self, hidden: mx.array, weight: mx.array) -> mx.array:
        """Logits of normed `hidden`, with `weight` (vocab_size, hidden_size) in the layer that makes them."""
        tail = self._tail
        (tail.model.embed_tokens if self.config.tie_word_embeddings else tail.lm_head).weight = weight
        return tail.logits(hidden)

    @cached_property
    def _tail(self) -> Model:
        """The model with the weights that follow its layers, without the matrix of the head."""
        left_out = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
        names = [name for name in self.source.tensors if layer_of(name) is None and name not in left_out]
        self._model.load_weights([(name, self.source.read(name).astype(mx.float32)) for name in names], strict=False)
        return self._model

    def run(self, layer: DecoderLayer, hidden: mx.array) -> mx.array:
        """`hidden` after `layer`, evaluated."""
        parts = []
        for part in _parts(hidden):
            parts.append(self._forward(layer, part))
            mx.eval(parts[-1])
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def inputs(self, layer: DecoderLayer, path: str, hidden: mx.array) -> Iterator[list[mx.array]]:
        """The inputs of each matrix of the linear layer `path` of `layer`, in parts (tokens, width).

        What follows that linear layer is not computed.
        """
        with _recording(layer, [path]) as recorders:
            for part in _parts(hidden):
                self._forward(layer, part)  # lazy: only what is asked for is ever computed
                yield recorders[path].seen()

    def trace(self, layer: DecoderLayer, hidden: mx.array) -> Iterator[tuple[Traced, mx.array]]:
        """In parts: the inputs (tokens, width) of each matrix of each linear layer, and `hidden` after `layer`.

        A linear layer has one matrix, or one for each expert, whose inputs are the tokens routed to it.
        """
        with _recording(layer, self.linears) as recorders:
            for part in _parts(hidden):
                after = self._forward(layer, part)
                seen = {path: recorder.seen() for path, recorder in recorders.items()}
                mx.eval(after, seen)
                yield seen, after

    def _forward(self, layer: DecoderLayer, hidden: mx.array) -> mx.array:
        length = hidden.shape[1]
        long = self.config.longrope is not None and length > self.config.original_max_position_embeddings
        return layer(hidden, make_mask(length, self.config.sliding_window), None, 0, long)


def _parts(hidden: mx.array) -> Iterator[mx.array]:
    rows = max(1, TOKENS_AT_ONCE // hidden.shape[1])
    for first in range(0, len(hidden), rows):
        yield hidden[first : first + rows]


class _Recorder(nn.Module):
    """Stands for a linear layer and keeps its last input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._last: tuple[Any, ...] = ()

    def __call__(self, x: mx.array, *groups: Groups) -> mx.array:
        self._last = (x, *groups)
        return self.layer(x, *groups)

    def seen(self) -> list[mx.array]:
        """The last input (tokens, width) of each matrix."""
        x, *groups = self._last
        return groups[0].by_expert(x) if groups else [x.flatten(0, -2)]


@contextmanager
def _recording(layer: DecoderLayer, paths: Sequence[str]) -> Iterator[dict[str, _Recorder]]:
    """Recorders in the place of these linear layers, until the block ends."""
    recorders = {path: _Recorder(linear(layer, path)) for path in paths}
    for path, recorder in recorders.items():
        _put(layer, path, recorder)
    try:
        yield recorders
    finally:
        for path, recorder in recorders.items():
            _put(layer, path, recorder.layer)


def linear(layer: DecoderLayer, path: str) -> nn.Module:
    """The linear layer at `path` ("mlp.down_proj") inside a decoder layer."""
    return reduce(getattr, path.split("."), layer)


def _put(layer: DecoderLayer, path: str, new: nn.Module) -> None:
    home, _, name = path.rpartition(".")
    setattr(linear(layer, home), name, new)


def layer_of(name: str) -> int | None:
    """The index of the decoder layer a tensor belongs to."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None
