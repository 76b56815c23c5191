"""Path patching: what one head tells another place, and the answer by that way alone (arXiv 2304.05969)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OptionError
from .edits import patch
from .grids import ContrastedPrompts, PatchGrid
from .keeping import Keep
from .selecting import LayerIndexes, Positions
from .side_by_side import LAST_NORMED, Metric, at_least_one, each_for_its_row, ids_of_prompt, measured_by
from .table import indexes_of, layers_of, place_of, places_of
from .tracing import inspect

if TYPE_CHECKING:
    from ..config import Config
    from ..models.decoder import Model

_NO_RECEIVERS = ("embed", "z", "head_out", "attn_out", "experts", "blocks", "logits")  # none hears, or is held


def patch_paths(
    model: Model,
    clean: Sequence[int] | mx.array,
    corrupted: Sequence[int] | mx.array,
    metric: Metric,
    receivers: Keep | Iterable[Keep],
    *,
    layers: LayerIndexes = None,
    positions: Positions = None,
    through_mlps: bool = True,
    batch: int = 8,
) -> PatchGrid:
    """Read the corrupted prompt with what each head of the clean run tells the receivers, by itself.

    `receivers`: places of the layers and heads that are told, such as `Keep("q", layers=5, heads=2)`, or
    `Keep("final_in")` for the logits. For each sender the corrupted prompt is read with its clean `z` (at `positions`,
    None: all), while every other head gives what it gave; feed-forward parts pass it on, or are held too where
    `through_mlps` is false. What the receivers then have is put into a corrupted run, whose metric counts. Senders are
    the heads of `layers`, None: of all that stand before the last receiver. Exchange the prompts to see what breaks.

    Returns a grid of layers and heads. Raises OptionError for receivers that no head can tell anything, prompts of two
    lengths, and what `inspect` raises.
    """
    told = [receivers] if isinstance(receivers, Keep) else list(receivers)
    before = _layers_before(told, model.config)
    rows = indexes_of(range(before) if layers is None else layers, model.config.num_hidden_layers, "layer")
    pair = ContrastedPrompts(model, clean, corrupted, metric, Keep("z", layers=rows, positions=positions), batch)
    prompt, heads = ids_of_prompt(corrupted), list(range(model.config.num_attention_heads))
    held_places = ["z"] if through_mlps else ["z", "mlp_out"]
    as_it_was = inspect(model, prompt, held_places)
    held = [patch(place, as_it_was) for place in held_places]
    senders = [[patch("z", pair.values, layers=i, heads=head, positions=positions)] for i in rows for head in heads]
    values: list[float] = []
    for first in range(0, len(senders), at_least_one(batch)):
        some = senders[first : first + batch]
        ids = [prompt] * len(some)
        heard = inspect(model, ids, told, [*held, *each_for_its_row(some)])
        passed_on = [patch(to.place, heard, layers=to.layers, heads=to.heads, positions=to.positions) for to in told]
        values += measured_by(metric, model, inspect(model, ids, LAST_NORMED, passed_on)).tolist()  # type: ignore[arg-type]
    return pair.grid(values, rows, heads)


def _layers_before(receivers: Sequence[Keep], config: Config) -> int:
    """How many layers have heads that can tell the last of the receivers something."""
    if not receivers:
        raise OptionError("receivers has none; give one or more Keep(place, ...)")
    order, before = [*places_of(config)], []
    for keep in receivers:
        if not isinstance(keep, Keep) or keep.place in _NO_RECEIVERS:
            raise OptionError(f"receivers has {keep}; give Keep(place, ...) of what heads tell, such as q or mlp_in")
        place = place_of(config, keep.place)
        for layer in layers_of(config, place, keep.layers):
            behind_attention = order.index(place.name) > order.index("attn_out")
            before.append(config.num_hidden_layers if layer is None else layer + behind_attention)
    if not any(before):
        raise OptionError("no head stands before the receivers; choose some in later layers")
    return max(before)
