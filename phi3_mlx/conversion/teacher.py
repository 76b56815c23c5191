"""A source's next-token distributions on a text, kept in a file: its likeliest tokens, and all others in one bucket.

Written when the source was there, they are all that training a packed model needs of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..evaluation.quality import chunks
from ..models.normalizer import log_normalizer
from ..store.atomic import new_file
from ..store.checkpoint import read_arrays
from .layerwise import LayerStream

KEPT = 256  # of a distribution's tokens
_LEAST_REST = 1e-9  # probability of the other tokens, under which the bucket is not told from nothing


@dataclass(frozen=True)
class Teacher:
    """`ids` (rows, length), and of what follows each: `tokens` (rows, length, k), the likeliest, and their `log_probs`.

    The rows from `fitted` on are held out.
    """

    ids: mx.array
    tokens: mx.array
    log_probs: mx.array
    fitted: int

    def divergence(self, logits: mx.array, rows: mx.array) -> mx.array:
        """KL(source || model), the mean in nats a token: `logits` (len(rows) * length, vocab_size) of these rows."""
        tokens, wanted = (array[rows].flatten(0, 1) for array in (self.tokens, self.log_probs))
        model = mx.take_along_axis(logits, tokens, axis=-1) - log_normalizer(logits)[:, None]
        shares = mx.exp(wanted)
        kept = (shares * (wanted - model)).sum(axis=-1)
        rest, model_rest = (mx.maximum(1 - mx.exp(array).sum(axis=-1), _LEAST_REST) for array in (wanted, model))
        return (kept + rest * (mx.log(rest) - mx.log(model_rest))).mean()


def write_teacher(path: Path, stream: LayerStream, hidden: mx.array, ids: mx.array, fitted: int) -> None:
    """Write the source's distributions: `hidden` (rows, length, hidden_size) is the text `ids` after its last layer."""
    weight = stream.source.read(f"{stream.head_path}.weight").astype(mx.float32)
    tokens, log_probs = (mx.concatenate(list(kind)) for kind in zip(*_likeliest(stream, hidden, weight), strict=True))
    arrays = {
        "ids": ids,
        "tokens": tokens.reshape(*ids.shape, -1),
        "log_probs": log_probs.reshape(*ids.shape, -1),
        "held_out": ids[fitted:],
    }
    mx.eval(arrays)
    with new_file(path) as file:
        mx.save_safetensors(file, arrays)


def _likeliest(stream: LayerStream, hidden: mx.array, weight: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """(tokens, their log-probabilities) (n, k), of a few tokens of the text at a time."""
    flat = hidden.flatten(0, 1)
    kept = min(KEPT, len(weight))
    for here in chunks(len(flat), len(weight)):
        logits = stream.logits(stream.norm(flat[here]), weight)
        tokens = mx.argpartition(-logits, kept - 1, axis=-1)[:, :kept]
        log_probs = mx.take_along_axis(logits, tokens, axis=-1) - log_normalizer(logits)[:, None]
        mx.eval(tokens, log_probs)
        yield tokens, log_probs


def read_teacher(path: Path) -> Teacher:
    """What `write_teacher` wrote. Raises CheckpointError for a file that cannot be read."""
    arrays = read_arrays(path)
    return Teacher(arrays["ids"], arrays["tokens"], arrays["log_probs"], len(arrays["ids"]) - len(arrays["held_out"]))
