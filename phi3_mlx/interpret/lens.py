"""The logit lens: what the model would say if it ended after each of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..engine.scores import positions_at_once
from ..models.normalizer import log_normalizer
from ..threads import turn
from ..values import choice
from .coloured import TokenTable, token_texts
from .keeping import Keep
from .selecting import LayerIndexes, Positions
from .side_by_side import check_token
from .table import shortened
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.vocabulary import Tokenizer

_STREAMS = ("resid_pre", "resid_mid", "resid_post")


class Lens:
    """The residual stream of some layers, read by the model's own last norm and head: make it with `logit_lens`.

    `layers` and `positions` are those that it has. Logits are made when they are asked for, some positions at a time.
    """

    def __init__(self, model: Model, streams: Sequence[mx.array], layers: Sequence[int], positions: Sequence[int]):
        self._model, self._streams = model, streams
        self.layers, self.positions = list(layers), list(positions)

    def __repr__(self) -> str:
        rows, positions, _ = self._streams[0].shape
        return f"<Lens: layers {shortened(self.layers)}, {rows} rows, {positions} positions>"

    def logits(self) -> mx.array:
        """All of them, (layers, B, positions, V) in float32."""
        return mx.stack([self._read(stream, lambda logits, _: logits) for stream in self._streams])

    def top(self, count: int = 5) -> tuple[mx.array, mx.array]:
        """The likeliest tokens, the first first: ids and log-probabilities, (layers, B, positions, count) each."""
        ids = [self._read(stream, lambda logits, _: mx.argsort(-logits)[:, :count]) for stream in self._streams]
        return mx.stack(ids), self.log_probabilities(mx.stack(ids))

    def log_probabilities(self, tokens: int | Sequence[Sequence[int]] | mx.array) -> mx.array:
        """Of some tokens, as `ranks` takes them, or (layers, B, positions, n) of n for each: of the same shape.

        Raises OptionError for ids outside the vocabulary, as `ranks` does.
        """

        def scored(logits: mx.array, ids: mx.array) -> mx.array:
            return mx.take_along_axis(logits, ids, axis=-1) - log_normalizer(logits)[:, None]

        return self._of_tokens(tokens, scored)

    def ranks(self, tokens: int | Sequence[Sequence[int]] | mx.array | None = None) -> mx.array:
        """How many tokens are likelier than these: (layers, B, positions), 0 for the likeliest of all.

        `tokens`: one id for all, or ids (B or 1, positions); None: what the last of the layers finds likeliest.
        """
        if tokens is None:
            tokens = self._read(self._streams[-1], lambda logits, _: mx.argmax(logits, axis=-1))

        def ranked(logits: mx.array, ids: mx.array) -> mx.array:
            scores = mx.take_along_axis(logits, ids, axis=-1)
            return mx.stack([(logits > scores[:, n : n + 1]).sum(axis=-1) for n in range(ids.shape[1])], axis=-1)

        return self._of_tokens(tokens, ranked)

    def table(self, tokenizer: Tokenizer, row: int = 0) -> TokenTable:
        """The likeliest token of each layer at each position of a row, coloured by its probability, for a notebook."""
        ids, log_p = self.top(1)
        cells = [token_texts(tokenizer, layer) for layer in ids[:, row, :, 0].tolist()]  # type: ignore[arg-type, union-attr]
        return TokenTable(cells, mx.exp(log_p[:, row, :, 0]), rows=self.layers, columns=self.positions)

    def _of_tokens(
        self, tokens: int | Sequence[Sequence[int]] | mx.array, use: Callable[[mx.array, mx.array], mx.array]
    ) -> mx.array:
        ids, shape = mx.array(tokens), (len(self._streams), *self._streams[0].shape[:2])  # type: ignore[arg-type]
        for outermost in (ids.min(), ids.max()):
            check_token(int(outermost), self._model.config.vocab_size)
        several = ids.ndim == 4
        ids = mx.broadcast_to(ids if several else ids[..., None], (*shape, ids.shape[-1] if several else 1))
        each = [self._read(stream, use, layer) for stream, layer in zip(self._streams, ids, strict=True)]
        return mx.stack(each) if several else mx.stack(each).squeeze(-1)

    def _read(
        self,
        stream: mx.array,
        use: Callable[[mx.array, mx.array], mx.array],
        ids: mx.array | None = None,
    ) -> mx.array:
        """(B, positions, ...) of what `use` makes of logits (n, V) and ids (n, k) of some positions at a time."""
        flat, at_once = stream.flatten(0, 1), positions_at_once(self._model.config.vocab_size)
        chosen = mx.zeros((len(flat), 0), mx.int32) if ids is None else ids.flatten(0, 1)
        pieces = []
        with turn():
            for first in range(0, len(flat), at_once):
                part = slice(first, first + at_once)
                logits = self._model.head(self._model.model.last_norm(flat[part])).astype(mx.float32)
                pieces.append(use(logits, chosen[part]))
                mx.eval(pieces[-1])
        return mx.unflatten(mx.concatenate(pieces), 0, stream.shape[:2])


def logit_lens(
    model: Model,
    ids: Sequence[int] | Sequence[Sequence[int]] | mx.array,
    *,
    layers: LayerIndexes = None,
    positions: Positions = None,
    place: str = "resid_post",
) -> Lens:
    """Read token ids, and give what the stream of each layer says by the model's own last norm and head.

    `ids`: as `inspect` takes them. `layers` and `positions`: as `Keep` takes them, None for all. `place`: "resid_post",
    "resid_mid" or "resid_pre". After the last layer that is what the model says. Raises what `inspect` raises.
    """
    choice(place, "place", _STREAMS)
    inside = inspect(model, ids, Keep(place, layers=layers, positions=positions))
    known = inside.layers(place)
    return Lens(model, [inside[place, layer] for layer in known], known, inside.positions(place, known[0]))
