"""What heads do with a text that comes twice: which look back, which find what followed, and which repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OptionError
from ..threads import turn
from ..values import listed, whole
from .directions import head_directions, norm_scale, normed_directions, one_hot, stream_directions
from .keeping import Inside
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of each head, (layers, H) in float32, over the second time that random tokens come.

    `previous`: the probability that it gives to the token before. `induction`: to the token behind the same token's
    first place, which is the one that comes next. `copying`: what it adds to the logits of the tokens that it looks at,
    each counted by its probability, over what it adds to the average token; in nats, by itself (`attribute`).
    """

    previous: mx.array
    induction: mx.array
    copying: mx.array

    def __repr__(self) -> str:
        layers, heads = self.previous.shape
        best = [f"most {name} {_largest(scores)}" for name, scores in vars(self).items()]
        return f"<HeadScores: {layers} layers x {heads} heads, {', '.join(best)}>"


def _largest(scores: mx.array) -> str:
    layer, head = divmod(int(mx.argmax(scores)), scores.shape[1])
    return f"{float(scores.max()):.2f} (layer {layer}, head {head})"


def score_heads(
    model: Model,
    *,
    length: int = 50,
    rows: int = 4,
    seed: int = 0,
    tokens: Sequence[int] | mx.array | None = None,
    prefix: Sequence[int] = (),
) -> HeadScores:
    """Read random tokens twice over, and score each head by where it looks and what it adds there.

    `rows` sequences of `length` different tokens, read as `prefix` + tokens + tokens. `tokens`: ids to draw from, None:
    the whole vocabulary. `prefix`: ids before them, such as that of the beginning. Raises OptionError for fewer
    ids than `length`, and what `inspect` raises.
    """
    drawn = _draw(model, whole(length, "length"), whole(rows, "rows"), whole(seed, "seed"), tokens)
    start = mx.broadcast_to(mx.array([*prefix], dtype=mx.int32), (rows, len(prefix)))
    ids = mx.concatenate([start, drawn, drawn], axis=1)
    inside = inspect(model, ids, ["pattern", "z", "final_in"])
    second = mx.arange(len(prefix) + length, ids.shape[1])
    with turn():
        layers = inside.layers("pattern")
        looked = [inside["pattern", layer][:, :, second] for layer in layers]  # (rows, H, length, S)
        previous = [_attention_to(pattern, second - 1) for pattern in looked]
        induction = [_attention_to(pattern, second - length + 1) for pattern in looked]
        scores = HeadScores(mx.stack(previous), mx.stack(induction), _copying(model, inside, ids, second))
        mx.eval(vars(scores))
    return scores


def _draw(model: Model, length: int, rows: int, seed: int, tokens: Sequence[int] | mx.array | None) -> mx.array:
    """Different ids in each of the rows (rows, length)."""
    known = list(range(model.config.vocab_size)) if tokens is None else listed(tokens) or []
    if not 2 <= length <= len(known) or rows < 1:
        raise OptionError(
            f"{rows} rows of {length} different tokens cannot be drawn of {len(known):,}; length is 2 or more"
        )
    keys = mx.random.split(mx.random.key(seed), rows)
    places = mx.stack([mx.random.permutation(len(known), key=key)[:length] for key in keys])
    return mx.array(known, dtype=mx.int32)[places]


def _attention_to(pattern: mx.array, keys: mx.array) -> mx.array:
    """The mean probability (H,) of pattern (rows, H, queries, S) at one key a query."""
    return mx.take_along_axis(pattern, keys[None, None, :, None], axis=3).mean(axis=(0, 2, 3))


def _copying(model: Model, inside: Inside, ids: mx.array, second: mx.array) -> mx.array:
    """`HeadScores.copying`, (layers, H).

    A token's logit over the average one's reads a direction of the stream, and through the output projection a
    direction of each head's own values: so heads are not projected one by one.
    """
    layers, by_row = range(model.config.num_hidden_layers), []
    for row in range(len(ids)):
        weights = one_hot(ids[row], model.config.vocab_size) - 1 / model.config.vocab_size
        read = stream_directions(model, normed_directions(model, weights))  # (S, d)
        scale = norm_scale(model, inside["final_in"][row, second])  # (queries, 1)
        scores = []
        for layer in layers:
            z = inside["z", layer][row, second].astype(mx.float32) * scale[:, :, None]  # (queries, H, D)
            added = mx.einsum("qhd,shd->hqs", z, head_directions(model, layer, read))
            scores.append((added * inside["pattern", layer][row][:, second]).sum(axis=2).mean(axis=1))
        by_row.append(mx.stack(scores))
        mx.eval(by_row[-1])
    return mx.stack(by_row).mean(axis=0)
