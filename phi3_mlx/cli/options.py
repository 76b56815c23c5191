"""Options that several commands share, and how they read text. The same option means the same everywhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..errors import PromptError

F = TypeVar("F", bound=Callable[..., Any])


def model_option(function: F) -> F:
    return click.option(
        "-m",
        "--model",
        default="tiny",
        show_default=True,
        metavar="NAME",
        help="A name of `phi3-mlx models`, a directory, or a Hugging Face repository (OWNER/REPO).",
    )(function)


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


def sampling_options(max_tokens: int) -> Callable[[F], F]:
    """Adds the sampling options; the command gets them as one `sampling: SamplingOptions`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **options: Any) -> Any:
            names = SamplingOptions.__dataclass_fields__
            options["sampling"] = SamplingOptions(**{name: options.pop(name) for name in names})
            return function(*args, **options)

        for option in reversed(
            [
                click.option("--max-tokens", type=int, default=max_tokens, show_default=True, help="Longest answer."),
                click.option(
                    "--temperature",
                    type=float,
                    default=0.0,
                    show_default=True,
                    help="0: always the likeliest token; 0.7: varied; above 1: wild.",
                ),
                click.option("--top-p", type=float, default=1.0, help="Only the likeliest tokens that reach P in sum."),
                click.option("--top-k", type=int, default=0, help="Only the K likeliest tokens."),
                click.option("--min-p", type=float, default=0.0, help="Only tokens P times as likely as the likeliest."),
                click.option(
                    "--repetition-penalty", type=float, default=1.0, help="Above 1: avoid tokens already there."
                ),
                click.option("--seed", type=int, default=None, help="Repeat the same draw."),
                click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
            ]
        ):
            command = option(command)
        return command  # type: ignore[return-value]

    return decorate


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


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes of the file `name` as text; PromptError says where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8 text (byte {error.start:,}); convert it with iconv -t utf-8") from error
