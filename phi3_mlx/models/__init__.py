"""One architecture a file; `build` picks it by the config's `model_type`."""

from __future__ import annotations

from ..config import Phi3Config
from .phi3 import Model

_ARCHITECTURES = {"phi3": Model}


def build(config: Phi3Config) -> Model:
    """A model of random weights for a config; nothing is computed until its weights are used."""
    return _ARCHITECTURES[config.model_type](config)
