"""What of a run can be told from its settings, config and examples before anything is planned or loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.folder import WEIGHTS
from ..errors import OptionError, Phi3Error
from .data import Splits, hold_out
from .run_settings import RunSettings, S, no_effect
from .settings import HOLDOUT, Settings

if TYPE_CHECKING:
    from ..config import Config
    from ..text.tokenizer import Tokenizer
    from .examples import Encoded

_MAX_LENGTH = 2048  # tokens of an example where nothing is said: most chats are shorter, and memory grows with it


def check_is_model(settings: Settings, directory: Path) -> None:
    """OptionError for an adapter in a model's place."""
    if (directory / WEIGHTS).is_file() and not (directory / "config.json").exists():
        raise OptionError(
            f"{settings.model} is an adapter; to train on from it give from_adapter={str(directory)!r}, and the model "
            "that it was trained on"
        )


def check_method(settings: Settings, config: Config) -> None:
    """OptionError for whole weights that cannot be trained."""
    if settings.method != "full":
        return
    if config.quantization is not None:
        raise OptionError(
            f"{settings.model} is quantized, and packed weights cannot be trained; take method='lora', or "
            "dequantize it first with phi3-mlx convert --dequantize"
        )
    check_dtype_of_all(settings)


def check_dtype_of_all(settings: RunSettings) -> None:
    """OptionError for a type that whole weights cannot be trained in."""
    if settings.dtype == "float16":
        raise OptionError(
            "dtype float16 cannot train whole weights: squares of their gradients are below what it holds, and "
            "optimizers divide by them; leave dtype out, which trains in float32"
        )


def lost_updates(settings: RunSettings) -> tuple[str, ...]:
    """A sentence about whole weights in a type that loses a part of what they learn."""
    if settings.method != "full" or settings.dtype != "bfloat16":
        return ()
    return (
        "whole weights are trained in bfloat16, which loses updates below 1/256 of a weight; leave dtype out for "
        "float32",
    )


def with_length(settings: S, config: Config, usual: int = _MAX_LENGTH) -> S:
    """Settings whose `max_length` is a number, by default `usual`. OptionError for one that the model cannot read."""
    context = config.max_position_embeddings
    if settings.max_length is None:
        changed: dict[str, Any] = {"max_length": min(usual, context)}
        return dataclasses.replace(settings, **changed)
    if settings.max_length > context:
        raise OptionError(
            f"max_length {settings.max_length:,} is more than the model's context, {context:,} tokens; lower it"
        )
    return settings


def with_validation(splits: Splits, settings: Settings, *, resume: bool) -> Splits:
    """The data, with a part held out for validation where it brings none. Raises OptionError for a useless holdout."""
    if splits.valid and settings.valid is None and settings.holdout not in (0, HOLDOUT) and not resume:
        raise no_effect("holdout", settings.holdout, f"since {settings.data} has valid.jsonl")
    if splits.valid or not settings.holdout:
        return splits
    held = hold_out(splits.train, settings.holdout, settings.seed)
    return dataclasses.replace(held, notes=(*splits.notes, *held.notes))


def check_examples(settings: Settings, train: Encoded, valid: Encoded, *, resume: bool) -> None:
    """OptionError where no example is left to train on, or none for what validation is asked for."""
    if not train.examples:
        longest = max(train.lengths)
        cut = longest > settings.max_length  # type: ignore[operator]
        way_out = f"give max_length={longest} or overflow='truncate'" if cut else "give others"
        raise OptionError(
            f"no example of {settings.data} is left to train on: {len(train.dropped):,} are longer than max_length "
            f"{settings.max_length}, {len(train.empty):,} have nothing to learn; {way_out}"
        )
    if not valid.examples and not resume:
        for name in ("patience", "samples"):
            if getattr(settings, name):
                why = "without validation: no examples are left for it, so give more, or some in valid=FILE"
                raise no_effect(name, getattr(settings, name), why)


def check_samples(settings: Settings, tokenizer: Tokenizer, config: Config) -> None:
    """OptionError for a sample that could not be answered."""
    from ..engine.plan import check_length
    from ..generation.answers import encode_prompt

    for prompt in settings.samples:
        try:
            check_length(config, len(encode_prompt(tokenizer, prompt)))
        except Phi3Error as error:
            raise OptionError(f"samples: {error}") from error
