"""Options that several commands share. The same option means the same everywhere."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import OptionError, Phi3Error
from ..generation.request import CHAT_TOKENS, Request
from ..option import Option, option_type
from .terminal import note

if TYPE_CHECKING:
    from pathlib import Path

    from ..models.cache import KVBits
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: str
    revision: str | None
    dtype: str | None
    longrope: Any
    adapter: tuple[str, ...] = ()

    def find(self) -> Path:
        """The model's directory, downloaded if need be."""
        from ..store.hub import resolve

        return resolve(self.model, self.revision)

    def name(self) -> str:
        """The model's name wherever it is used from: a directory's is its whole path."""
        from ..store.hub import find_alias

        there = find_alias(self.model) is None and os.path.isdir(self.model)
        return os.path.abspath(self.model) if there else self.model

    def load_tokenizer(self, directory: Path) -> Tokenizer:
        from ..text.tokenizer import read_tokenizer

        return read_tokenizer(directory)

    def load_model(
        self, directory: Path, prompt: int, max_tokens: int, bits: KVBits | None, force: bool, kept: bool = False
    ) -> Model:
        """The model, unless it, a prompt of this many tokens and the answer do not fit in memory (and not `force`).

        `kept`: the bits are those of a cache that is there already.
        """
        from ..engine.plan import plan_run
        from ..generation.loading import load_adapted

        plan_run(
            directory,
            prompt,
            max_tokens,
            dtype=self.dtype,
            longrope=self.longrope,
            kv_bits=bits,
            kept=kept,
            force=force,
        )
        adapters = _weights(self.adapter)
        return load_adapted(
            directory, self.model, self.revision, dtype=self.dtype, longrope=self.longrope, adapters=adapters
        )


def _weighted(given: str) -> tuple[str, float]:
    """DIR or DIR=WEIGHT."""
    directory, equals, weight = given.rpartition("=")
    if not equals or os.path.isdir(given):  # a folder may have = in its name
        return given, 1.0
    try:
        return directory, float(weight)
    except ValueError as error:
        raise OptionError(f"{weight!r} is not an adapter's weight; write --adapter {directory}=0.5") from error


def _weights(given: Sequence[str]) -> dict[str, float]:
    """The folders of --adapter and their weights."""
    weights: dict[str, float] = {}
    for directory, weight in map(_weighted, given):
        if directory in weights:
            raise OptionError(f"--adapter {directory} is given twice; give it once, with the sum of the weights")
        weights[directory] = weight
    return weights


revision_option = click.option("--revision", metavar="REV", help="A branch, tag or commit of the repository.")


def dtype_option(help_text: str) -> Callable[[F], F]:
    """--dtype; each command says of what."""
    return click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help=help_text)


compute_dtype = dtype_option("Compute in this type. Without it: the model's own on a GPU, float32 on the CPU.")


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
            revision_option,
            compute_dtype,
            click.option(
                "--longrope",
                type=click.Choice(["auto", "short", "long"]),
                default="auto",
                show_default=True,
                help="LongRoPE's factors; auto chooses by length, as the reference does.",
            ),
            click.option(
                "--adapter",
                multiple=True,
                metavar="DIR[=WEIGHT]",
                help="Use the adapter in this folder; may be repeated, and the changes add up. WEIGHT is 1 by default.",
            ),
        ],
    )


class _KVBitsType(click.ParamType):
    name = "BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            bits = [int(part) for part in value.split(",")]
        except ValueError:
            bits = []
        if len(bits) not in (1, 2):
            self.fail(f"{value!r} is not a number of bits such as 4, or two such as 8,4 for keys and values")
        return bits[0], bits[-1]


def _keep_within(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Bounds the plans of the whole command."""
    if value is not None:
        from ..engine.machine import memory_limit

        ctx.with_resource(memory_limit(value))


within_memory = click.option(
    "--memory",
    metavar="SIZE",
    expose_value=False,
    callback=_keep_within,
    help="Use at most this much, such as 16GB, and never more than the machine has free.",
)


def of_field(field: Option, shown: object = None, **more: Any) -> dict[str, Any]:
    """What Click is told of a field that a user can set: its type and help, and the default that it writes beside it.

    `more`: what the command line alone knows.
    """
    kind, choices = option_type(field), field.metadata.get("choices")
    typed: Any = click.Choice(choices) if choices else {"int": int, "float": float, "bool": bool}.get(kind, str)
    help_text = field.metadata["help"] + (f"  [default: {shown}]" if shown is not None else "")  # as Click writes it
    return {"type": typed, "is_flag": kind == "bool", "multiple": kind.startswith("tuple"), "help": help_text, **more}


REQUEST_FIELDS = {field.name: field for field in fields(Request)}


def request_option(name: str, **more: Any) -> Callable[[F], F]:
    """The option of a field of `Request`; see `of_field`."""
    field = REQUEST_FIELDS[name]
    return click.option(f"--{name.replace('_', '-')}", name, **of_field(field, **{"default": field.default, **more}))


force_memory = request_option("force")
_MEMORY = [
    request_option("kv_bits", type=_KVBitsType()),
    request_option("kv_group_size", shown=32),
    within_memory,
    force_memory,
]
_SAMPLING = [
    request_option("max_tokens", default=CHAT_TOKENS, show_default=True),
    request_option("temperature", show_default=True),
    *map(request_option, ("top_p", "top_k", "min_p", "repetition_penalty", "seed")),
    request_option("stop", multiple=True, metavar="TEXT"),
    request_option("lookup", show_default=True),
]


def answer_options(function: F) -> F:
    """Adds the options of an answer; the command gets them as one `request: Request`."""
    return _gathered(function, "request", Request, [*_SAMPLING, *_MEMORY])


def memory_options(function: F) -> F:
    """Adds --kv-bits and what belongs to it; the command gets them as one `request: Request`."""
    return _gathered(function, "request", Request, _MEMORY)


def note_idle(request: Request) -> None:
    """Say which options do nothing beside the others."""
    for name in ("top_p", "top_k", "min_p"):
        if request.temperature == 0 and getattr(request, name) != REQUEST_FIELDS[name].default:
            option = f"--{name.replace('_', '-')}"
            note(f"{option} changes nothing at --temperature 0, where the likeliest is taken")


def _gathered(function: F, name: str, kind: type, options: Sequence[Callable[[Any], Any]]) -> F:
    """`function` with these options, which it gets as one argument `name` of the dataclass `kind`.

    Other options of the function that are fields of `kind` are part of it too.
    """

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        names = [field.name for field in fields(kind) if field.name in given]
        given[name] = kind(**{field: given.pop(field) for field in names})
        return function(*args, **given)

    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def as_typed(error: Phi3Error, command: click.Command) -> str:
    """A message with the options of a command for Python's names, `max_tokens 0` in front too; see `in_options`."""
    message, options = str(error), dict(_options(command))
    first = message.split(" ", 1)[0]
    if isinstance(error, OptionError) and first in options:
        message = options[first] + message.removeprefix(first)
    return in_options(message, command)


def in_options(text: str, command: click.Command) -> str:
    """A text with the options of a command for Python's arguments: `kv_bits=4`, `resume=True`, `method='lora'`."""
    options = dict(_options(command))

    def option(match: re.Match[str]) -> str:
        name, quoted, plain = match.groups()
        if name not in options:
            return match[0]
        return options[name] if plain == "True" else f"{options[name]} {shlex.quote(quoted) if quoted else plain}"

    # Not in names of files: folders of a series of runs are called runs/rank=8.
    return re.sub(r"(?<![^\s(])([a-z_]+)=(?:'([^'\n]+)'|([\w.]+))", option, text)


def _options(command: click.Command) -> Iterator[tuple[str | None, str]]:
    """Parameters of a command, and of those below it, with their options."""
    for below in getattr(command, "commands", {}).values():
        yield from _options(below)
    for param in command.params:
        if isinstance(param, click.Option):
            yield param.name, max(param.opts, key=len)
