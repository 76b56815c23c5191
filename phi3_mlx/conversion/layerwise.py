"""A source's model run layer by layer: one layer of weights in memory at a time, beside the activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ..config import parse_config
from ..models.attention import make_mask
from ..models.phi3 import DecoderLayer
from ..models.rope import Rope

if TYPE_CHECKING:
    from .sources import Source

# The linear layers of a decoder layer, in the order they are used.
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_TOKENS_AT_ONCE = 4096


class LayerStream:
    """Reads `source` layer by layer and runs activations (rows, length, hidden_size) through it, in float32.

    Every row is a sequence of its own that begins at position 0.
    """

    def __init__(self, source: Source):
        self.source = source
        self.config = parse_config(source.config, source.name)
        self._rope = Rope(self.config)

    @property
    def head_path(self) -> str:
        """The path of the layer that makes logits."""
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    def embed(self, ids: mx.array) -> mx.array:
        """ids (rows, length) -> (rows, length, hidden_size)."""
        hidden = self.source.read(f"{EMBEDDING}.weight")[ids].astype(mx.float32)
        mx.eval(hidden)
        return hidden

    def layer(self, i: int) -> DecoderLayer:
        """Decoder layer `i` with the source's weights."""
        layer = DecoderLayer(self.config, self._rope)
        prefix = f"model.layers.{i}."
        names = [name for name in self.source.tensors if name.startswith(prefix)]
        layer.load_weights([(name.removeprefix(prefix), self.source.read(name).astype(mx.float32)) for name in names])
        mx.eval(layer.parameters())
        return layer

    def norm(self, hidden: mx.array) -> mx.array:
        """The norm after the last layer."""
        return mx.fast.rms_norm(hidden, self._norm, self.config.rms_norm_eps)

    @cached_property
    def _norm(self) -> mx.array:
        return self.source.read("model.norm.weight").astype(mx.float32)

    def run(self, layer: DecoderLayer, hidden: mx.array) -> mx.array:
        """`hidden` after `layer`, evaluated."""
        parts = []
        for part in _parts(hidden):
            parts.append(self._forward(layer, part))
            mx.eval(parts[-1])
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def inputs(self, layer: DecoderLayer, path: str, hidden: mx.array) -> Iterator[mx.array]:
        """What the linear layer `path` of `layer` is given, in parts (tokens, width); nothing behind it is computed."""
        with _recording(layer, [path]) as recorders:
            for part in _parts(hidden):
                self._forward(layer, part)  # lazy: only what is asked for is ever computed
                yield recorders[path].seen.flatten(0, -2)

    def trace(self, layer: DecoderLayer, hidden: mx.array) -> Iterator[tuple[dict[str, mx.array], mx.array]]:
        """In parts: what each linear layer of `layer` is given (tokens, width), by path, and `hidden` after `layer`."""
        with _recording(layer, LINEARS) as recorders:
            for part in _parts(hidden):
                after = self._forward(layer, part)
                seen = {path: recorder.seen.flatten(0, -2) for path, recorder in recorders.items()}
                mx.eval(after, seen)
                yield seen, after

    def _forward(self, layer: DecoderLayer, hidden: mx.array) -> mx.array:
        length = hidden.shape[1]
        long = self.config.longrope is not None and length > self.config.original_max_position_embeddings
        return layer(hidden, make_mask(length, self.config.sliding_window), None, 0, long)


def _parts(hidden: mx.array) -> Iterator[mx.array]:
    rows = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
    for first in range(0, len(hidden), rows):
        yield hidden[first : first + rows]


class _Recorder(nn.Module):
    """Stands for a linear layer and keeps its last input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.seen = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = x
        return self.layer(x)


@contextmanager
def _recording(layer: DecoderLayer, paths: Sequence[str]) -> Iterator[dict[str, _Recorder]]:
    """For a while, recorders in the place of these linear layers."""
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
    block, name = path.split(".")
    return getattr(getattr(layer, block), name)


def _put(layer: DecoderLayer, path: str, new: nn.Module) -> None:
    block, name = path.split(".")
    setattr(getattr(layer, block), name, new)


def layer_of(name: str) -> int | None:
    """The index of the decoder layer a tensor belongs to."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None
