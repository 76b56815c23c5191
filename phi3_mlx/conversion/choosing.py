"""What a source becomes: the recipe and the dtype, from what was asked for and what the source is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import OptionError
from ..paths import expanded
from .options import ConvertOptions
from .recipes import Recipe, left_alone
from .sources import OpenedSource, Source, own_dtype


@dataclass(frozen=True)
class Choice:
    """`recipe` packs (None: nothing is packed), and messages call it `name`; the rest is in `dtype` (None: as it is).

    Where a measurement will choose the bits, `recipe` stands for its result until it is made.
    `notes` are sentences that the caller should see.
    """

    recipe: Recipe | None
    name: str
    dtype: str | None
    notes: tuple[str, ...]


def choose(source: OpenedSource, options: ConvertOptions) -> Choice:
    """The choice for a source. OptionError for one that is packed where nothing says what to make of it."""
    notes = _about_packed(source, options)
    if source.blocks and not (options.names_packing or options.dequantize or options.rounding != "round"):
        return _kept_blocks(source, options.dtype, notes)
    recipe: Recipe | None = options.uniform | left_alone(source.config)
    name = source.name
    if options.dequantize:
        recipe = None
    if options.recipe is not None:
        recipe, name = _given_recipe(options.recipe)
    return Choice(recipe, name, options.dtype or own_dtype(source.config), notes)


def _about_packed(source: Source, options: ConvertOptions) -> tuple[str, ...]:
    """What to say about a source that is packed already; OptionError where nothing says what to make of it."""
    if source.quantization is None or options.dequantize:
        return ()
    now = f"{source.quantization.get('bits', '?')}-bit"
    if not options.names_packing:
        raise OptionError(
            f"{source.name} is {now} already; dequantize=True writes it in floats, bits=N dequantizes it and rounds a "
            "second time"
        )
    return (
        f"{source.name} is {now} already: it was dequantized and rounded a second time, which costs quality; "
        "convert the original if you can",
    )


def _kept_blocks(source: OpenedSource, dtype: str | None, notes: tuple[str, ...]) -> Choice:
    """The choice that keeps what a source stores in blocks."""
    recipe = _recipe_of_blocks(source)
    but = "" if dtype in (None, "float16", "float32") else f", but for their scales, rounded to {dtype}"
    notes += (f"the blocks of {source.name} are kept as they are{but}; bits=N rounds them a second time",)
    others = [
        path for path, packing in recipe.items() if isinstance(packing, dict) and f"{path}.weight" not in source.blocks
    ]
    if others:
        notes += (
            f"{len(others)} matrices of other types are rounded to 8 bits ({others[0]}, ...); not with dequantize=True",
        )
    # float16 holds the scales of GGUF's blocks exactly.
    return Choice(recipe, source.name, dtype or "float16", notes)


def _recipe_of_blocks(source: OpenedSource) -> Recipe:
    """The recipe that keeps what a source stores in blocks, and floats; matrices of other packed types get 8 bits."""
    stored = {name: blocks.packing for name, blocks in source.blocks.items()}
    widths = [packing["bits"] for packing in stored.values()]
    every = {"group_size": 32, "bits": max(set(widths), key=widths.count), "mode": "affine"}
    recipe: Recipe = dict(every)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) > 1 and stored.get(name) != every:
            other = every | {"bits": 8} if source.float_type(name) is None else False
            recipe[name.removesuffix(".weight")] = stored.get(name, other)
    return recipe


def _given_recipe(recipe: str | Path | Mapping[str, Any]) -> tuple[Recipe, str]:
    """A recipe and what messages call it. A config.json may stand for the recipe it holds."""
    if isinstance(recipe, Mapping):
        return dict(recipe), "the recipe"
    path = expanded(recipe)
    content = read_json(path, way_out="give recipe.json of an earlier run, or a config.json")
    return content.get("quantization") or content, str(path)
