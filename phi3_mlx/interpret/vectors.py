"""Steering vectors from pairs of prompts: what a place has for one kind of prompt more than for another.

Difference of means: Marks and Tegmark, "The Geometry of Truth" (2023); Rimsky et al., "Steering Llama 2 via Contrastive
Activation Addition" (2023). Principal component of pairs: Zou et al., "Representation Engineering" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..generation.answers import Prompt, encode_prompt
from ..values import choice, listed, refusal, shown, whole
from .keeping import Keep
from .selecting import LayerIndexes, Positions
from .table import layers_of, place_of, places
from .tracing import inspect

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

Method = Literal["difference", "pca"]
Length = Literal["means", "unit", "stream"]
_ONE_VECTOR = ("(B, L, d)", "(B, L, n)")  # shapes of places with one vector a token
_ROUNDING = 1e-5  # of a vector's length, in float32
_SUCH = "such as resid_post, attn_out, mlp_out or act"


def activations(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    *,
    place: str = "resid_post",
    layers: LayerIndexes = None,
    positions: Positions = -1,
    raw: bool = False,
    batch_size: int = 16,
) -> dict[int, mx.array]:
    """What a place has for each prompt, by layer: (prompts, width) float32.

    `positions`, as in `Keep`: the mean over them is taken; -1 is the prompt's last token, None all of them. `prompts`
    are texts (in the chat template unless `raw`), lists of messages, or lists of ids; `batch_size` of them are read
    together, and each gives what it gives alone. Raises OptionError for a place that has no single vector for a token,
    or a position that a prompt lacks; PromptError, ChatError, MemoryLimitError.
    """
    places(model)
    named, size = place_of(model.config, place), whole(batch_size, "batch_size")
    if not named.per_layer or named.shape not in _ONE_VECTOR:
        raise OptionError(f"place {place} is {named.shape}; take one of layers with one vector a token, {_SUCH}")
    if size < 1:
        raise OptionError(f"batch_size is {size}; give 1 or more")
    if isinstance(prompts, str) or (several := listed(prompts)) is None or not several:
        raise OptionError(f"prompts is {shown(prompts)}; give a list of prompts")
    numbers = [layer for layer in layers_of(model.config, named, layers) if layer is not None]
    ids = [encode_prompt(tokenizer, prompt, raw=raw) for prompt in several]
    by_length = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    means: dict[int, dict[int, mx.array]] = {layer: {} for layer in numbers}
    for first in range(0, len(ids), size):
        together = by_length[first : first + size]
        inside = inspect(model, [ids[prompt] for prompt in together], Keep(place, numbers, positions=positions))
        for layer in numbers:
            for row, prompt in enumerate(together):
                means[layer][prompt] = inside[place, layer, row][0].astype(mx.float32).mean(axis=0)
        mx.eval(means)
    return {layer: mx.stack([of_layer[prompt] for prompt in range(len(ids))]) for layer, of_layer in means.items()}


def steering_vectors(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[Prompt, Prompt]],
    *,
    method: Method = "difference",
    length: Length = "means",
    place: str = "resid_post",
    layers: LayerIndexes = None,
    positions: Positions = -1,
    raw: bool = False,
    batch_size: int = 16,
) -> dict[int, mx.array]:
    """The vectors that lead from the second prompts of pairs to the first, (width,) float32 by layer, for `steer`.

    `method`: "difference" of the means, or "pca": the direction in which the two prompts of a pair differ most, the
    first principal component of pairs that are centred each on its middle, towards the first prompts. `length`:
    "means", the distance of the means along it, so that strength 1 moves one to the other; "unit", 1; "stream", as long
    as what is at the place on average, so that the strength is a share of it. The others are those of `activations`.
    Raises what that does, and OptionError for no pairs, or pairs that do not differ.
    """
    listed_pairs = [*map(_pair, listed(pairs) or [])]
    if not listed_pairs:
        raise refusal(pairs, "pairs", "a list of pairs of prompts")
    prompts = [prompt for pair in listed_pairs for prompt in pair]
    kept = activations(
        model,
        tokenizer,
        prompts,
        place=place,
        layers=layers,
        positions=positions,
        raw=raw,
        batch_size=batch_size,
    )
    return {layer: mx.array(direction(x[::2], x[1::2], method, length, layer)) for layer, x in kept.items()}


def direction(
    towards: mx.array, away: mx.array, method: Method = "difference", length: Length = "means", layer: int | None = None
) -> np.ndarray:
    """A layer's vector of `steering_vectors`, (width,) float32, of pairs of rows of two arrays (pairs, width)."""
    choice(method, "method", ("difference", "pca"))
    choice(length, "length", ("means", "unit", "stream"))
    first, second = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (towards, away))
    apart = first.mean(axis=0) - second.mean(axis=0)
    if method == "pca":
        axis = np.linalg.svd(first - second, full_matrices=False)[2][0]  # of pairs' two halves: opposite, so centred
        axis = -axis if axis @ apart < 0 else axis
    else:
        axis = apart / (np.linalg.norm(apart) or 1)
    lengths = {"means": axis @ apart, "unit": 1.0, "stream": np.linalg.norm([*first, *second], axis=1).mean()}
    vector = axis * lengths[length]
    # Equal prompts in two rows of one batch may differ by rounding.
    if np.linalg.norm(apart) <= _ROUNDING * lengths["stream"] or not np.linalg.norm(vector):
        raise OptionError(f"the prompts of pairs do not differ in layer {layer} at these positions; take others")
    return vector.astype(np.float32)


def _pair(pair: object) -> tuple[Prompt, Prompt]:
    """Two prompts. Raises OptionError for what is not two."""
    two = listed(pair)
    if two is None or len(two) != 2:
        raise OptionError(f"pairs has {shown(pair)}; expected two prompts")
    return two[0], two[1]
