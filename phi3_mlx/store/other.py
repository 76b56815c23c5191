"""Models of other families, by name: `mlx-lm:NAME`, or a directory of another model_type. They are mlx-lm's to read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import values
from ..config import read_json
from ..errors import CheckpointError, OptionError, Phi3Error
from ..fields import shorten
from ..models import ARCHITECTURES
from ..models.other import Model
from ..threads import refuse_fork
from . import hub
from .checkpoint import target_dtype

_MOST_SAID = 300  # characters of what mlx-lm says


class Place(NamedTuple):
    """A model's directory, and whether mlx-lm's code is to run it."""

    directory: Path
    is_other: bool

    @property
    def code(self) -> str:
        """Whose code runs it."""
        return "mlx-lm" if self.is_other else "phi3-mlx"


def find(name: str | Path, revision: str | None = None, given: Mapping[str, object] = MappingProxyType({})) -> Place:
    """Where the model `name` is, downloaded if need be.

    mlx-lm's code runs it with `mlx-lm:` in front of the name, and if it is a directory of another model_type; then the
    options `given` are refused. Raises what `hub.resolve` does, and OptionError.
    """
    text = values.path(name, "model", "the name or directory of a model")
    if text.startswith(hub.OTHER):
        check_other(given)  # before anything is downloaded
        name = text.removeprefix(hub.OTHER)
        if not name:
            raise OptionError(f"{text} names no model; write {text}OWNER/REPO or {text}DIRECTORY")
        return Place(hub.resolve(name, revision), True)
    directory = hub.resolve(name, revision)
    is_other = not hub.is_repository(text) and _is_other(directory)
    if is_other:
        check_other(given)
    return Place(directory, is_other)


def check_other(given: Mapping[str, object]) -> None:
    """OptionError if an option is given, by its name, that a model of another family cannot take."""
    for name, value in given.items():
        if value and value != "auto":
            raise OptionError(f"{name} is for the Phi family alone, and this model runs with mlx-lm; leave it out")


def _is_other(directory: Path) -> bool:
    """Whether a directory's config.json names a model_type that is not the family's."""
    if not os.path.isfile(directory / "config.json"):
        return False
    model_type = read_json(directory / "config.json").get("model_type")
    return isinstance(model_type, str) and model_type not in ARCHITECTURES


def outline_other(directory: Path, dtype: str | None = None) -> Model:
    """The model of a directory as mlx-lm makes it. No weight is read before `read_weights`, so it can be planned.

    Code that a directory brings is never run. Raises CheckpointError, with mlx-lm's words, for what it cannot load.
    """
    target = target_dtype(dtype)
    refuse_fork()
    raw = read_json(directory / "config.json")
    if raw.get("model_file") is not None:
        raise CheckpointError(
            f"{directory} brings code of its own ({shorten(raw['model_file'])}), which is never run; "
            "take a model that mlx-lm knows"
        )
    try:
        from mlx_lm.utils import load_model

        network, _ = load_model(directory, lazy=True)
        if target is not None:
            network.set_dtype(target)
        return Model(network, raw)
    except Phi3Error:
        raise
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"config.json lacks {reason}, which mlx-lm asks of a {raw.get('model_type')}"
        raise CheckpointError(f"mlx-lm cannot load {directory}: {reason[:_MOST_SAID]}") from error


def read_weights(model: Model) -> None:
    """Read all weights now, one after the other. Raises CheckpointError for a damaged file."""
    try:
        for _, array in tree_flatten(model.parameters()):
            mx.eval(array)
    except RuntimeError as error:
        raise CheckpointError(f"the weights cannot be read ({' '.join(str(error).split())[:_MOST_SAID]})") from error
