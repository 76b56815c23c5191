"""--steer and --steer-layers: saved steering vectors that are added while a model answers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..errors import OptionError

if TYPE_CHECKING:
    import mlx.core as mx

    from ..models.decoder import Model
    from ..store.other import Place

Steering = list[tuple[dict[int, "mx.array"], float]]  # vectors by layer, and their strength

steer_option = click.option(
    "--steer",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="Add the steering vectors of this file (.safetensors, or .gguf as llama.cpp has them), STRENGTH times, 1 by "
    "default; may be repeated, and they add up.",
)
steer_layers_option = click.option(
    "--steer-layers",
    metavar="FIRST-LAST",
    help="Of the files of --steer, add the vectors of these layers alone, counted from 0: 8-12, or 8.",
)


def read_steering_options(given: Sequence[str], layers: str | None, place: Place) -> Steering:
    """The vectors of --steer and --steer-layers for the model of a directory, of which no weight is read.

    Raises OptionError for a strength or layers that are none, a file of another model or without these layers, and
    CheckpointError for a bad file.
    """
    if not given:
        if layers is not None:
            raise OptionError("--steer-layers has no effect without --steer; name a file of vectors")
        return []
    from ..conversion.control_vector import read_steering
    from ..interpret.table import shortened
    from ..models import read_config

    chosen, config = _layers(layers), read_config(place.directory)
    steering: Steering = []
    for file, strength in map(_with_strength, given):
        vectors = read_steering(file, config)
        some = {layer: vector for layer, vector in vectors.items() if chosen is None or layer in chosen}
        if not some:
            there = shortened(sorted(vectors))
            raise OptionError(f"{file} has vectors of layers {there}, and none of --steer-layers {layers}")
        steering.append((some, strength))
    return steering


@contextmanager
def steered(model: Model, steering: Steering) -> Iterator[None]:
    """A model answers under these vectors until the block ends; without any it is left alone."""
    if not steering:
        yield
        return
    from ..interpret.edits import steer
    from ..interpret.tracing import trace

    with trace(model, edits=[steer(vectors, strength=strength) for vectors, strength in steering]):
        yield


def _layers(given: str | None) -> range | None:
    """FIRST-LAST or one layer; None for all."""
    if given is None:
        return None
    bounds = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", given)
    if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
        raise OptionError(f"--steer-layers {given!r} are no layers; write 8-12, or 8")
    return range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)


def _with_strength(given: str) -> tuple[str, float]:
    """FILE or FILE=STRENGTH."""
    file, equals, strength = given.rpartition("=")
    if not equals or os.path.exists(given):  # a file may have = in its name
        return given, 1.0
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not file:
        raise OptionError(f"--steer {given}: {strength!r} is not a strength; write --steer {file or 'FILE'}=0.5")
    return file, number
