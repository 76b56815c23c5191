"""What a file's rounding cost, in the file's own metadata, so that it goes wherever the file goes.

It is known only when the file is there and was read, and metadata stands at its beginning. So its keys are written with
no numbers (NaN), which are put in their places in the end.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_KL_KEY, _TOP1_KEY, _TEXT_KEY = "phi3_mlx.kl", "phi3_mlx.top1", "phi3_mlx.measured_on"
_FLOAT32 = 6  # the format's number of that type


@dataclass(frozen=True)
class Measurement:
    """`kl`: mean divergence from the model that the file was made of, in nats a token; `top1`: share of positions
    with the same likeliest token; `text`: what was read."""

    kl: float
    top1: float
    text: str


def awaited_metadata(text: str) -> dict[str, Any]:
    """The keys of a measurement that is to come, on what is called `text`."""
    return {_KL_KEY: math.nan, _TOP1_KEY: math.nan, _TEXT_KEY: text}


def put_measurement(file: Path, kl: float, top1: float) -> None:
    """Put the numbers in their places in a file that was written with `awaited_metadata`. OSError where that fails."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as data:
        for key, number in ((_KL_KEY, kl), (_TOP1_KEY, top1)):
            name = key.encode()
            entry = struct.pack(f"<Q{len(name)}sI", len(name), name, _FLOAT32)
            place = data.find(entry) + len(entry)
            if place < len(entry):
                raise CheckpointError(f"{file} was changed while it was measured, and has no {key}; export it again")
            data[place : place + 4] = struct.pack("<f", number)
        data.flush()
        os.fsync(opened.fileno())


def measurement_of(metadata: Mapping[str, Any]) -> Measurement | None:
    """What a file's metadata says; None where nothing was measured."""
    kl, top1, text = (metadata.get(key) for key in (_KL_KEY, _TOP1_KEY, _TEXT_KEY))
    if not isinstance(kl, float) or not isinstance(top1, float) or not isinstance(text, str):
        return None
    return Measurement(kl, top1, text) if math.isfinite(kl) and math.isfinite(top1) else None
