"""A source's model run layer by layer: one layer of weights in memory at a time, beside the activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..models import build
from ..models.attention import make_mask
from ..models.decoder import Model
from ..models.experts import Groups
from ..models.hooks import get_layer, replaced
from ..models.layer import DecoderLayer

if TYPE_CHECKING:
    from ..evaluation.quality import OutputHead
    from .sources import Source

Traced = dict[str, list[mx.array]]  # by the path of a linear layer: the inputs of each of its matrices

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOKENS_AT_ONCE = 4096
_ATTENTION_WRITES, _MLP_WRITES = ("self_attn.o_proj", "self_attn.dense"), ("mlp.down_proj",)
_SECOND_NORM = "post_attention_layernorm"  # reads the residual stream that the feed-forward part adds to


class Inputs(NamedTuple):
    """What a matrix reads in the source and in the packed model: `source` and `packed` (tokens, inputs).

    `stream`: where its outputs are added to the residual stream, that stream in both before they are
    (tokens, outputs).
    """

    source: mx.array
    packed: mx.array
    stream: tuple[mx.array, mx.array] | None = None


class Passage:
    """A text on its way through a layer: `hidden` (rows, length, hidden_size) is before it, cut into `parts`.

    `mixed`: of each part, what attention's heads have mixed (rows, length, width), and `outputs`: what is behind the
    layer. Where they are known for good, later passes begin there.
    """

    def __init__(self, layer: DecoderLayer, hidden: mx.array):
        self.layer, self.hidden = layer, hidden
        self.parts = list(_parts(hidden))
        self.mixed: list[mx.array] = []
        self.outputs: list[mx.array] = []


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

    def twin(self, layer: DecoderLayer, i: int) -> DecoderLayer:
        """Another decoder layer `i` with the weights of `layer`, which take no memory until they are replaced."""
        twin = self._model.model.make_layer(i)
        twin.update(layer.parameters())
        return twin

    def norm(self, hidden: mx.array) -> mx.array:
        """The norm after the last layer."""
        return self._tail.model.last_norm(hidden)

    def logits(self, hidden: mx.array, weight: mx.array) -> mx.array:
        """Logits of normed `hidden`, with `weight` (vocab_size, hidden_size) in the layer that makes them."""
        tail = self._tail
        (tail.model.embed_tokens if self.config.tie_word_embeddings else tail.lm_head).weight = weight
        return tail.logits(hidden)

    def head(self, weight: mx.array) -> OutputHead:
        """`logits` with this weight."""
        return lambda hidden, _: self.logits(hidden, weight)

    @cached_property
    def _tail(self) -> Model:
        """The model with the weights that follow its layers, without the matrix of the head."""
        left_out = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
        names = [name for name in self.source.tensors if layer_of(name) is None and name not in left_out]
        self._model.load_weights([(name, self.source.read(name).astype(mx.float32)) for name in names], strict=False)
        return self._model

    def run(self, layer: DecoderLayer, hidden: mx.array) -> mx.array:
        """`hidden` after `layer`, evaluated."""
        return self.after(Passage(layer, hidden))

    def after(self, passage: Passage) -> mx.array:
        """A text after the layer that it goes through, evaluated."""
        parts = passage.outputs
        for k in range(len(parts), len(passage.parts)):
            parts.append(self._through(passage, k))
            mx.eval(parts[-1])
        return mx.concatenate(parts) if parts else passage.hidden

    def inputs(self, layer: DecoderLayer, path: str, hidden: mx.array) -> Iterator[list[mx.array]]:
        """The inputs of each matrix of the linear layer `path` of `layer`, in parts (tokens, width).

        What follows that linear layer is not computed.
        """
        with _recording(layer, [path]) as recorders:
            for part in _parts(hidden):
                self._forward(layer, part)  # lazy: only what is asked for is ever computed
                yield recorders[path].seen()

    def pairs(self, source: Passage, packed: Passage, path: str) -> Iterator[list[Inputs]]:
        """The inputs of each matrix of `path` in the source's layer, beside those in the packed one.

        In parts, token by token the same: the experts of `source` get the tokens that `packed` sends to them. Experts
        have no `stream`: what a token gets is a sum of theirs. All that comes before `path` is final, and all of
        `source` is, so passages keep what was computed once.
        """
        router = self.config.router
        recorded = [path, _SECOND_NORM] if path in _MLP_WRITES else [path]
        with ExitStack() as stack:
            if router is not None and router != path:
                stack.enter_context(_routed_alike(source.layer, packed.layer, router))
            ours = stack.enter_context(_recording(source.layer, recorded))
            theirs = stack.enter_context(_recording(packed.layer, recorded))
            for k, (a, b) in enumerate(zip(source.parts, packed.parts, strict=True)):
                self._through(packed, k)
                output, stream = self._through(source, k), None
                if path == self.linears[-1] and router is None:
                    mx.eval(output)  # and the inputs of `path` with it
                    source.outputs.append(output)
                if path in _ATTENTION_WRITES:
                    stream = a.flatten(0, -2), b.flatten(0, -2)
                    for passage, recorders in ((source, ours), (packed, theirs)):
                        passage.mixed.append(recorders[path].seen()[0].reshape(*a.shape[:2], -1))
                        mx.eval(passage.mixed[k])
                elif path in _MLP_WRITES:
                    stream = ours[_SECOND_NORM].seen()[0], theirs[_SECOND_NORM].seen()[0]
                seen = zip(ours[path].seen(), theirs[path].seen(), strict=True)
                yield [Inputs(x, packed_x, stream) for x, packed_x in seen]

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

    def _through(self, passage: Passage, k: int) -> mx.array:
        """A part of a text after the layer, not evaluated."""
        if k < len(passage.mixed):
            return passage.layer.after_attention(passage.parts[k], passage.mixed[k])
        return self._forward(passage.layer, passage.parts[k])

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
    recorders = {path: _Recorder(get_layer(layer, path)) for path in paths}
    with replaced(layer, recorders):
        yield recorders


class _Scores(nn.Module):
    """Stands for a router and keeps what it last said; or says what another said last."""

    def __init__(self, router: nn.Module | None, last: dict[str, mx.array]):
        super().__init__()
        self.router = router
        self._last = last

    def __call__(self, x: mx.array) -> mx.array:
        if self.router is not None:
            self._last["scores"] = self.router(x)
        return self._last["scores"]


@contextmanager
def _routed_alike(source: DecoderLayer, packed: DecoderLayer, router: str) -> Iterator[None]:
    """Until the block ends, `source` sends its tokens where `packed` sent those that it read last."""
    last: dict[str, mx.array] = {}
    says, hears = _Scores(get_layer(packed, router), last), _Scores(None, last)
    with replaced(source, {router: hears}), replaced(packed, {router: says}):
        yield


def layer_of(name: str) -> int | None:
    """The index of the decoder layer a tensor belongs to."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None
