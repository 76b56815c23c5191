"""Direct logit attribution: what each part of the model adds to a logit by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OptionError
from ..threads import turn
from ..values import token_ids, whole
from .directions import norm_bias, norm_scale, normed_directions, one_hot, stream_directions
from .keeping import Keep
from .side_by_side import check_token
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model

_Chosen = int | Sequence[int] | mx.array  # ids: one for all sequences, or one for each


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What the parts add to a logit, or to the difference of two, of B sequences; all in float32.

    `embed` (B,), `attention` and `mlp` (B, layers), `heads` (B, layers, H): attention without its bias; `constant`
    (B,): biases behind the layers. `logit` (B,) is what the model gave, `total` the sum of all parts.
    """

    embed: mx.array
    attention: mx.array
    mlp: mx.array
    heads: mx.array
    constant: mx.array
    logit: mx.array

    @property
    def total(self) -> mx.array:
        return self.embed + self.attention.sum(axis=1) + self.mlp.sum(axis=1) + self.constant

    def __repr__(self) -> str:
        rows, layers, heads = self.heads.shape
        logits = ", ".join(f"{float(logit):.3f}" for logit in self.logit[:4]) + ", ..." * (rows > 4)
        return f"<Attribution: {rows} rows, {layers} layers x {heads} heads, logit {logits}>"


def attribute(
    model: Model,
    ids: Sequence[int] | Sequence[Sequence[int]] | mx.array,
    token: _Chosen,
    against: _Chosen | None = None,
    *,
    position: int = -1,
) -> Attribution:
    """What each layer and head adds by itself to the logit of `token`, less that of `against`, at a position.

    The stream is the sum of what the parts added, and the last norm is linear once its scale is held at what it was;
    so the parts' sum is the logit. `ids`: as `inspect` takes them. A stream that edits have changed is more than its
    parts, and the sum lacks that. Raises what `inspect` raises, OptionError for a token that is none.
    """
    where = [whole(position, "position")]
    kept = ("embed", "attn_out", "head_out", "mlp_out", "final_in", "final_norm")
    inside = inspect(model, ids, [Keep(place, positions=where) for place in kept])
    weights = _weights(model, token, inside.rows)
    if against is not None:
        weights = weights - _weights(model, against, inside.rows)
    with turn():
        normed = normed_directions(model, weights)
        read = norm_scale(model, inside["final_in"][:, 0]) * stream_directions(model, normed)  # (B, d)

        def added(part: mx.array) -> mx.array:
            """(B, 1, ..., d) -> (B, ...)"""
            part = part[:, 0].astype(mx.float32)
            return (part * (read if part.ndim == 2 else read[:, None])).sum(axis=-1)

        def by_layer(place: str) -> mx.array:
            return mx.stack([added(inside[place, layer]) for layer in inside.layers(place)], axis=1)

        bias = model.head(mx.zeros((1, model.config.hidden_size), model.dtype)).astype(mx.float32)
        result = Attribution(
            embed=added(inside["embed"]),
            attention=by_layer("attn_out"),
            mlp=by_layer("mlp_out"),
            heads=by_layer("head_out"),
            constant=normed @ norm_bias(model) + (weights * bias).sum(axis=-1),
            logit=(model.head(inside["final_norm"][:, 0]).astype(mx.float32) * weights).sum(axis=-1),
        )
        mx.eval(vars(result))
    return result


def _weights(model: Model, token: _Chosen, rows: int) -> mx.array:
    """Ids as (rows, V), 1 at each row's token."""
    listed = [token] * rows if isinstance(token, int) else token_ids(token) or []
    size = model.config.vocab_size
    for listed_id in listed:
        check_token(whole(listed_id, "token"), size)
    if len(listed) != rows:
        raise OptionError(f"{len(listed)} tokens are given for {rows} sequences; give one, or one for each")
    return one_hot(mx.array(listed), size)
