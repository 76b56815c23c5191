"""A model and its tokenizer, by name: planned, then loaded; and given back."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import OptionError, Phi3Error
from ..models.decoder import Model
from ..paths import expanded
from ..values import flag, number, path, refusal, shown

if TYPE_CHECKING:
    from ..models.decoder import LongRopeRule
    from ..store.checkpoint import Checkpoint
    from ..text.tokenizer import Tokenizer


def load(
    name: str | Path,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    adapter: str | Path | Mapping[str, float] | None = None,
    force: bool = False,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer.

    `name`: "tiny" (bundled), an alias of `phi3-mlx models`, a local directory, or a Hugging Face repository id, then
    with an optional `revision`. `dtype`: "float32", "bfloat16" or "float16" instead of the device's best.
    `adapter`: a folder of `phi3-mlx tune` or mlx-lm, or several with their weights, {"one": 1.0, "other": 0.5}.
    A model that the memory at hand cannot hold is refused before it is read, unless `force`.
    "mlx-lm:NAME", or a directory of another model_type, is a model of another family that mlx-lm's code runs, for
    comparison and as a judge: it answers (`generate` and its kin), and exactness is promised for the Phi family alone.
    Raises ModelNotFoundError, CheckpointError, ConfigError, TokenizerError, AdapterError, OptionError or
    MemoryLimitError.
    """
    from ..store import checkpoint, other
    from ..text import tokenizer

    folder = "an adapter's folder, or several with their weights"
    given = list(adapter.items()) if isinstance(adapter, Mapping) else [] if adapter is None else [(adapter, 1.0)]
    weights = {path(source, "adapter", folder): number(weight, "an adapter's weight") for source, weight in given}
    directory, is_other = other.find(name, revision, {"longrope": longrope, "adapter": weights})
    if is_other:
        vocabulary = tokenizer.read_tokenizer(directory, of_family=False)
        return load_other(directory, str(name), dtype=dtype, force=force), vocabulary
    vocabulary = tokenizer.read_tokenizer(directory)  # first: it reads little and fails fast
    source = checkpoint.open_checkpoint(directory)
    plan_loading(source, str(name), dtype=dtype, adapters=weights, force=force)
    return load_adapted(source, str(name), revision, dtype=dtype, longrope=longrope, adapters=weights), vocabulary


def load_adapted(
    source: Checkpoint,
    name: str,
    revision: str | None = None,
    *,
    dtype: str | None,
    longrope: LongRopeRule,
    adapters: Mapping[str, float],
) -> Model:
    """The model of a checkpoint that was asked for by `name`, with the adapters of these folders in use."""
    from ..store import checkpoint

    model = checkpoint.read_model(source, dtype=dtype, longrope=longrope)
    if adapters:
        from ..adapters.folder import apply, base_of

        apply(model, base_of(source, name, revision), adapters)
    return model


def sharing_weights(model: Model, source: Checkpoint, name: str, adapters: Mapping[str, float]) -> Model:
    """A model with adapters in use and the very arrays of `model`, which has none and was read from `source`."""
    from ..adapters.folder import apply, base_of
    from ..store import checkpoint

    adapted = checkpoint.outline(source)
    adapted.update(model.parameters())
    adapted.model.longrope = model.model.longrope
    apply(adapted, base_of(source, name), adapters)
    return adapted


def load_model(
    name: str | Path,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    force: bool = False,
) -> Model:
    """The model of `load` alone."""
    from ..store import checkpoint, other

    directory, is_other = other.find(name, revision, {"longrope": longrope})
    if is_other:
        return load_other(directory, str(name), dtype=dtype, force=force)
    source = checkpoint.open_checkpoint(directory)
    plan_loading(source, str(name), dtype=dtype, force=force)
    return load_adapted(source, str(name), revision, dtype=dtype, longrope=longrope, adapters={})


def load_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of `load` alone."""
    from ..store import other
    from ..text import tokenizer

    directory, is_other = other.find(name, revision)
    return tokenizer.read_tokenizer(directory, of_family=not is_other)


def load_other(
    directory: Path, name: str, *, dtype: str | None = None, prompt: int = 0, max_tokens: int = 0, force: bool = False
) -> Model:
    """The model of another family in a directory, asked for by `name`; planned from its files, and read if it fits.

    With a run of `prompt` and `max_tokens` tokens where there is a prompt, else by its weights alone. Raises what
    mlx-lm refuses as CheckpointError, MemoryLimitError unless `force`, and ContextLengthError.
    """
    from ..engine import machine, plan
    from ..store import other

    model = other.outline_other(directory, dtype)
    if prompt:
        plan.check_length(model.config, prompt)
        length = min(prompt + max_tokens, model.config.max_position_embeddings)
        run = plan.Workload.of_model(model, length)
        plan.check_fits(run, math.inf if force else machine.room(), prompt=prompt)
    elif not flag(force, "force"):
        plan.check_room(f"loading {name}", other_loading_bytes(model), "take a model of fewer bits")
    other.read_weights(model)
    return model


def other_loading_bytes(model: Model) -> dict[str, int]:
    """What takes memory while the weights of a model of another family are read, in bytes."""
    sizes = [array.nbytes for _, array in tree_flatten(model.parameters())]
    return {"weights": sum(sizes), "one of them as it is stored": max(sizes, default=0)}


def plan_loading(
    source: Checkpoint, name: str, *, dtype: str | None = None, adapters: Iterable[str] = (), force: bool = False
) -> None:
    """Raise MemoryLimitError if the weights of a checkpoint, asked for by `name`, do not fit (and not `force`).

    With those of the folders `adapters`. A run is planned when it begins, with its cache and work.
    """
    from ..engine import plan

    if not flag(force, "force"):
        plan.check_room(f"loading {name}", loading_bytes(source, dtype, adapters), "take a model of fewer bits")


def loading_bytes(
    source: Checkpoint, dtype: str | None = None, adapters: Iterable[str] = (), *, shared: bool = False
) -> dict[str, int]:
    """What takes memory while a model is loaded, in bytes; `shared`: its weights are in memory already."""
    from ..store import checkpoint

    size = checkpoint.model_size(source, dtype)
    adapted = sum(file.stat().st_size for folder in adapters for file in expanded(folder).glob("*.safetensors"))
    if shared:
        return {"adapters": adapted}
    return {"weights": size.weights + adapted, "one of them as it is stored": size.largest_cast}


def check_draft(draft: tuple[Model, Tokenizer], tokenizer: Tokenizer) -> Model:
    """The model of `draft`, all that `load` gives.

    Raises OptionError unless it is that, and its tokenizer has the vocabulary of `tokenizer`; Phi3Error if it was
    unloaded.
    """
    if not isinstance(draft, tuple) or len(draft) != 2:
        given = f"is {shown(draft)}" if isinstance(draft, str | Path) else "is not all that load() gives"
        raise OptionError(f"draft {given}; give the model and its tokenizer: draft=load(NAME)")
    model, drafting = draft
    check_loaded(model)
    check_family(model, "draft")
    check_tokenizer(drafting)
    check_vocabulary(drafting, tokenizer)
    return model


def check_vocabulary(drafting: Tokenizer, tokenizer: Tokenizer) -> None:
    """OptionError unless every id of a draft model's tokenizer means what it means in `tokenizer`."""
    from ..text.alike import first_difference

    number = first_difference(drafting, tokenizer)
    if number is not None:
        there, here = (shown(each.id_to_token(number)) for each in (drafting, tokenizer))
        raise OptionError(
            f"the draft model has another vocabulary than the model: token {number} is {there} there and {here} here; "
            "take a smaller model of the same tokenizer"
        )


def unload(model: Model) -> None:
    """Give the model's memory back, in a notebook say; the model cannot be used afterwards."""
    _check_model(model)
    model.clear()
    gc.collect()
    mx.clear_cache()


def check_loaded(model: Model) -> None:
    """Phi3Error unless it is a model, and one that was not unloaded."""
    _check_model(model)
    if not model:
        raise Phi3Error("this model was unloaded; load() it again")


def check_family(model: Model, what: str) -> None:
    """OptionError where `what` takes models of the Phi family alone, and this is another's."""
    if not model.of_family:
        raise OptionError(f"{what} takes models of the Phi family alone, and this one is {model.config.model_type}'s")


def _check_model(model: Model) -> None:
    if isinstance(model, str | Path):
        name = shown(str(model))
        raise Phi3Error(f"{name} is a model's name; give the model of: model, tokenizer = load({name})")
    if isinstance(model, tuple):
        raise Phi3Error("this is all that load() gives; take it apart first: model, tokenizer = load(...)")
    if not hasattr(model, "parameters"):
        raise refusal(model, "model", "the one that load() gives")


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """OptionError unless it is a tokenizer of this package."""
    from ..text.tokenizer import Tokenizer as Ours

    if not isinstance(tokenizer, Ours):
        raise refusal(tokenizer, "tokenizer", "the one that load() gives beside the model")
