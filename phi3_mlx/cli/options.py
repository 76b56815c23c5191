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
        """The model, unless it, a prompt of so many tokens and the answer do not fit in memory (and not `force`).

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
        raise OptionError(f"{weight!r} is no weight of an adapter; write --adapter {directory}=0.5") from error


def _weights(given: Sequence[str]) -> dict[str, float]:
    """The folders of --adapter and their weights."""
    weights: dict[str, float] = {}
    for directory, weight in map(_weighted, given):
        if directory in weights:
            raise OptionError(f"--adapter {directory} is given twice; give it once, with the sum of the weights")
        weights[directory] = weight
    return weights


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
class MemoryOptions:
    """How the cache is packed, and whether a run that does not fit is tried; by `generate`'s names."""

    kv_bits: tuple[int, int] | None
    kv_group_size: int | None
    force: bool

    def bits(self) -> KVBits | None:
        """Raises OptionError for bits that cannot be."""
        from ..models.cache import make_kv_bits

        return make_kv_bits(self.kv_bits, self.kv_group_size)


class _KVBitsType(click.ParamType):
    name = "BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = [int(part) for part in value.split(",")]
        except ValueError:
            found = []
        if len(found) not in (1, 2):
            self.fail(f"{value!r} is not a number of bits such as 4, or two such as 8,4 for keys and values")
        return found[0], found[-1]


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
FORCE_MEMORY = "Go on where the memory at hand is too small."
force_memory = click.option("--force", is_flag=True, help=FORCE_MEMORY)


def memory_options(function: F) -> F:
    """Adds --kv-bits and what belongs to it; the command gets them as one `memory: MemoryOptions`."""
    return _gathered(
        function,
        "memory",
        MemoryOptions,
        [
            click.option(
                "--kv-bits",
                type=_KVBitsType(),
                help="Pack keys and values in 8, 6, 4, 3 or 2 bits; two numbers (8,4) for keys and values apart.",
            ),
            click.option(
                "--kv-group-size",
                type=int,
                help="Packed numbers that share a scale: 32 or 64.  [default: 32]",
            ),
            within_memory,
            force_memory,
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
    lookup: int

    def check(self) -> None:
        """OptionError for a value outside its range; called before a model is fetched or read."""
        from ..engine.sampling import Sampling
        from ..generation.request import check_limits

        check_limits(self.max_tokens, self.stop, self.lookup)
        Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed)
        for name, value, off in (("top_p", self.top_p, 1), ("top_k", self.top_k, 0), ("min_p", self.min_p, 0)):
            if self.temperature == 0 and value != off:
                option = f"--{name.replace('_', '-')}"
                note(f"{option} changes nothing at --temperature 0, where the likeliest is taken")


def sampling_options(function: F) -> F:
    """Adds the sampling options; the command gets them as one `sampling: SamplingOptions`."""
    options = [
        click.option("--max-tokens", type=int, default=1024, show_default=True, help="Longest answer."),
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
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="End before this text, or control token; may be repeated."
        ),
        click.option(
            "--lookup",
            type=int,
            default=16,
            show_default=True,
            help="Tokens guessed from earlier text and verified at once, where it pays; 0: none. The text is the same.",
        ),
    ]
    return _gathered(function, "sampling", SamplingOptions, options)


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

    def option(found: re.Match[str]) -> str:
        name, quoted, plain = found.groups()
        if name not in options:
            return found[0]
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
