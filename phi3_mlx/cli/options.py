"""Options that several commands share, and how they read text. The same option means the same everywhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import PromptError

if TYPE_CHECKING:
    from ..models.phi3 import Model
    from ..tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read; `load` gives it and its tokenizer."""

    model: str
    revision: str | None
    dtype: str | None
    longrope: Any
    adapter: tuple[str, ...] = ()

    def load(self) -> tuple[Model, Tokenizer]:
        from ..generation import load

        adapter = dict(map(_weighted, self.adapter)) or None
        return load(self.model, self.revision, dtype=self.dtype, longrope=self.longrope, adapter=adapter)


def _weighted(given: str) -> tuple[str, float]:
    """DIR or DIR=WEIGHT."""
    directory, equals, weight = given.rpartition("=")
    try:
        return (directory, float(weight)) if equals else (given, 1.0)
    except ValueError:
        return given, 1.0  # a folder with = in its name


def model_options(function: F) -> F:
    """Adds -m and what belongs to it; the command gets them as one `source: ModelOptions`."""
    return _gathered(
        function,
        "source",
        ModelOptions,
        [
            click.option(
                "-m",
                "--model",
                default="tiny",
                show_default=True,
                metavar="NAME",
                help="A name of `phi3-mlx models`, a directory, or a Hugging Face repository (OWNER/REPO).",
            ),
            click.option("--revision", metavar="REV", help="A branch, tag or commit of the repository."),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                help="Compute in this type. Without it: the model's own on a GPU, float32 on the CPU.",
            ),
            click.option(
                "--longrope",
                type=click.Choice(["auto", "short", "long"]),
                default="auto",
                show_default=True,
                help="Which rotation factors; auto follows the length, as the reference does.",
            ),
            click.option(
                "--adapter",
                multiple=True,
                metavar="DIR[=WEIGHT]",
                help="With the adapter of this folder; several add up, each by its weight (1).",
            ),
        ],
    )


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling options of the command line, by `generate`'s names."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]

    def check(self) -> None:
        """OptionError for a value outside its range; called before a model is fetched or read."""
        from ..generation import check_limits
        from ..sampling import Sampling

        check_limits(self.max_tokens, self.stop)
        Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed)


def sampling_options(max_tokens: int) -> Callable[[F], F]:
    """Adds the sampling options; the command gets them as one `sampling: SamplingOptions`."""
    options = [
        click.option("--max-tokens", type=int, default=max_tokens, show_default=True, help="Longest answer."),
        click.option(
            "--temperature",
            type=float,
            default=0.0,
            show_default=True,
            help="0: always the likeliest token; 0.7: varied; above 1: wild.",
        ),
        click.option("--top-p", type=float, default=1.0, help="Only the likeliest tokens that together reach P."),
        click.option("--top-k", type=int, default=0, help="Only the K likeliest tokens."),
        click.option("--min-p", type=float, default=0.0, help="Only tokens P times as likely as the likeliest."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: avoid tokens already there."),
        click.option("--seed", type=int, help="Repeat the same draw."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    ]
    return lambda function: _gathered(function, "sampling", SamplingOptions, options)


def _gathered(function: F, name: str, kind: type, options: Sequence[Callable[[Any], Any]]) -> F:
    """`function` with these options, which it gets as one argument `name` of the dataclass `kind`."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        return function(*args, **given)

    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-". PromptError names the file and what is wrong with it."""
    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror}; give a readable text file") from error
    return decode_text(data, name)


def check_text(text: str, name: str) -> str:
    """`text`, or PromptError if it came from bytes that are not UTF-8 (Python keeps those as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} is not UTF-8 text (character {error.start + 1:,}); type it again") from error
    return text


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes of the file `name` as text; PromptError says where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8 text (byte {error.start:,}); convert it with iconv -t utf-8") from error
