"""Options that several commands share. The same option means the same everywhere."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..errors import OptionError, Phi3Error
from ..fields import parse
from ..generation.request import CHAT_TOKENS, Request
from ..option import DTYPE_NAMES, option
from ..sizes import parse_size
from .declare import fields_of, option_of, options_of
from .reading import check_text, read_input
from .terminal import note

if TYPE_CHECKING:
    from ..engine.prefixes import PrefixStore
    from ..generation.chunks import Chunk
    from ..models.decoder import LongRopeRule, Model
    from ..store.checkpoint import Checkpoint
    from ..store.other import Place
    from ..text.tokenizer import Tokenizer


class Draft(NamedTuple):
    """A draft model that was found."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: str = option(
        "tiny",
        "A name of `phi3-mlx models`, a directory, or a Hugging Face repository (OWNER/REPO).",
        flags="-m --model",
        metavar="NAME",
    )
    revision: str | None = option(None, "A branch, tag or commit of the repository.", metavar="REV")
    dtype: str | None = option(
        None, "Compute in this type. Without it: the model's own on a GPU, float32 on the CPU.", choices=DTYPE_NAMES
    )
    longrope: LongRopeRule = option(
        "auto", "LongRoPE's factors; auto chooses by length, as the reference does.", choices=("auto", "short", "long")
    )
    adapter: tuple[str, ...] = option(
        (),
        "Use the adapter in this folder; may be repeated, and the changes add up. WEIGHT is 1 by default.",
        metavar="DIR[=WEIGHT]",
    )

    draft_model: str | None = option(
        None,
        "Let a smaller model of the same vocabulary guess tokens, which the model verifies. The text stays the same.",
        metavar="NAME",
    )

    def find(self) -> Place:
        """Where the model is, one of the Phi family; downloaded if need be."""
        from ..store.hub import resolve
        from ..store.other import Place

        return Place(resolve(self.model, self.revision), False)

    def find_answering(
        self, request: Request, *, cache: str | None = None, prefixes: str | None = None, steer: Sequence[str] = ()
    ) -> Place:
        """Where the model is, perhaps of another family. OptionError for what that cannot take."""
        from ..store.other import find

        given = {name: getattr(self, name) for name in ("adapter", "longrope", "draft_model")}
        given |= {"kv_bits": request.kv_bits, "cache": cache, "prefixes": prefixes, "steer": steer}
        place = find(self.model, self.revision, given)
        if place.is_other:
            note(f"{self.model} runs with mlx-lm's code: exactness is promised for the Phi family alone")
        return place

    def name(self) -> str:
        """The model's name wherever it is used from: a directory's is its whole path."""
        from ..store.hub import find_alias

        there = find_alias(self.model) is None and os.path.isdir(self.model)
        return os.path.abspath(self.model) if there else self.model

    def load_tokenizer(self, place: Place) -> Tokenizer:
        from ..text.tokenizer import read_tokenizer

        return read_tokenizer(place.directory, of_family=not place.is_other)

    def find_draft(self, tokenizer: Tokenizer) -> Draft | None:
        """The draft model's files and tokenizer; OptionError if its vocabulary is not that of `tokenizer`."""
        from ..generation.loading import check_vocabulary
        from ..store.checkpoint import open_checkpoint
        from ..store.hub import resolve
        from ..text.tokenizer import read_tokenizer

        if self.draft_model is None:
            return None
        directory = resolve(self.draft_model)
        drafting = read_tokenizer(directory)
        check_vocabulary(drafting, tokenizer)
        return Draft(open_checkpoint(directory), drafting)

    def load_draft(self, draft: Draft | None) -> tuple[Model, Tokenizer] | None:
        """The draft model and its tokenizer, once `load_model` has planned the run with it."""
        from ..generation.loading import load_adapted

        if draft is None or self.draft_model is None:
            return None
        model = load_adapted(draft.checkpoint, self.draft_model, dtype=self.dtype, longrope=self.longrope, adapters={})
        return model, draft.tokenizer

    def load_model(
        self, place: Place, prompt: int, request: Request, *, kept: bool = False, draft: Draft | None = None
    ) -> Model:
        """The model, unless it, a prompt of this many tokens and the answer asked for do not fit in memory.

        `kept`: the bits are those of a cache that is there already. `draft` is to fit too. Raises MemoryLimitError and
        what `load` raises.
        """
        from ..engine.plan import plan_run
        from ..generation.loading import load_adapted, load_other
        from ..store.checkpoint import open_checkpoint

        if place.is_other:
            return load_other(
                place.directory,
                self.model,
                dtype=self.dtype,
                prompt=prompt,
                max_tokens=request.max_tokens,
                force=request.force,
            )
        checkpoint = open_checkpoint(place.directory)
        plan_run(
            checkpoint,
            prompt,
            request.max_tokens,
            dtype=self.dtype,
            longrope=self.longrope,
            kv_bits=request.cache_bits(),
            kept=kept,
            force=request.force,
            draft=None if draft is None else draft.checkpoint,
            verified=request.lookup + 1,
        )
        adapters = _weights(self.adapter)
        return load_adapted(
            checkpoint, self.model, self.revision, dtype=self.dtype, longrope=self.longrope, adapters=adapters
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


_memory = partial(
    click.option,
    "--memory",
    metavar="SIZE",
    help="Use at most this much, such as 16GB, and never more than the machine has free.",
)
within_memory = _memory(expose_value=False, callback=_keep_within)
memory_option = _memory()  # for a command that hands it on


_MODEL_FIELDS = fields_of(ModelOptions)
answering_model_options = options_of("source", ModelOptions)
model_options = options_of("source", ModelOptions, [name for name in _MODEL_FIELDS if name != "draft_model"])
draft_model_option = option_of(_MODEL_FIELDS["draft_model"], help="Count this draft model too.")
revision_option = option_of(_MODEL_FIELDS["revision"])
compute_dtype = option_of(_MODEL_FIELDS["dtype"])
longrope_option = option_of(_MODEL_FIELDS["longrope"])

REQUEST_FIELDS = fields_of(Request)
_OVERRIDES: dict[str, dict[str, Any]] = {"max_tokens": {"default": CHAT_TOKENS}, "kv_bits": {"type": _KVBitsType()}}
_MEMORY = ("kv_bits", "kv_group_size", "force")
_ANSWER = tuple(name for name in REQUEST_FIELDS if name not in ("max_tokens", "raw", *_MEMORY))


def _json_or_file(given: str) -> str:
    """JSON that was given as such, or that of a file. OptionError for a file without JSON."""
    if given.lstrip().startswith("{"):
        return check_text(given, "--schema")
    text = read_input(given)
    try:
        parse(text)
    except ValueError as error:
        raise OptionError(f"--schema {given} is no JSON: {error}") from None
    return text


def _request_options(*names: str) -> Callable[[Any], Any]:
    """Options of a `Request`, which the command gets as `request`."""
    then: dict[str, Callable[[Any], Any]] = {
        "schema": _json_or_file,
        "grammar": read_input,
        "regex": lambda given: check_text(given, "--regex"),
        "choices": lambda given: check_text(given, "--choices"),
        "stop": lambda given: tuple(check_text(text, "--stop") for text in given),
    }
    then = {name: read for name, read in then.items() if name in names}
    return options_of("request", Request, names, overrides=_OVERRIDES, before={"force": [within_memory]}, then=then)


answer_options = _request_options("max_tokens", *_ANSWER, *_MEMORY)  # --raw is for one prompt, of `generate` alone
_SERVED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "lookup", "kv_bits", "kv_group_size")
serving_options = _request_options("max_tokens", *_SERVED)
memory_options = _request_options(*_MEMORY)


prefixes_option = click.option(
    "--prefixes",
    metavar="DIR[=SIZE]",
    help="Keep what is read in files in this folder, and read only what no call before has. Prompts share what they "
    "begin with, so give a long text before the question. The files take 20GB at most, or SIZE.",
)


def open_prefixes(given: str | None, budget: int | str | None = None) -> PrefixStore | None:
    """The store of --prefixes, in `budget` bytes of memory, or all there are (it gives way); None without the option.

    Raises OptionError or CacheError.
    """
    from ..engine.machine import room
    from ..engine.prefixes import PrefixStore

    if given is None:
        return None
    budget = max(room(), 1) if budget is None else budget
    directory, equals, size = given.rpartition("=")
    if not equals or os.path.isdir(given):  # a folder may have = in its name
        directory, size = given, "20GB"
    if not directory:
        raise OptionError(f"--prefixes {given!r} names no folder; write --prefixes DIR or DIR=SIZE")
    try:
        disk = parse_size(size)
    except OptionError as error:
        raise OptionError(f"--prefixes {given}: {error}") from None
    return PrefixStore(budget, directory=directory, disk=disk)


def note_unwritten(prefixes: PrefixStore | None) -> None:
    """Say so where a file of --prefixes could not be written."""
    if prefixes is not None and prefixes.error is not None:
        error = prefixes.error
        note(f"--prefixes has written no file: {error.strerror if isinstance(error, OSError) else error}")


def note_idle(request: Request) -> None:
    """Say which options do nothing beside the others."""
    for name in ("top_p", "top_k", "min_p"):
        if request.temperature == 0 and getattr(request, name) != REQUEST_FIELDS[name].default:
            option = f"--{name.replace('_', '-')}"
            note(f"{option} changes nothing at --temperature 0, where the likeliest is taken")


def note_cut(request: Request, chunk: Chunk) -> None:
    """Say so where an answer that must have a form was cut."""
    if request.form is not None and chunk.finish_reason == "length":
        note(
            f"the answer was cut after {chunk.generation_tokens:,} tokens, and may not have its form; "
            "give a larger --max-tokens"
        )


def drafts_text(chunk: Chunk) -> str:
    """What --stats says of the drafts; nothing where there were none."""
    if not chunk.drafted_tokens:
        return ""
    return f", {chunk.accepted_tokens:,} of {chunk.drafted_tokens:,} drafted tokens held"


def as_typed(error: Phi3Error, command: click.Command) -> str:
    """A message with the options of a command for Python's names, `max_tokens 0` in front too; see `in_options`."""
    message, options = str(error), dict(_options(command))
    first = message.split(" ", 1)[0]
    if isinstance(error, OptionError) and first in options:
        message = options[first] + message.removeprefix(first)
    return in_options(message, command)


def in_options(text: str, command: click.Command) -> str:
    """A text with the options of a command for Python's arguments: `kv_bits=4`, `resume=True`, `method='lora'`."""
    options, opposites = dict(_options(command)), dict(_options(command, opposite=True))

    def option(match: re.Match[str]) -> str:
        name, quoted, plain = match.groups()
        if name not in options:
            return match[0]
        if plain == "False" and name in opposites:
            return opposites[name]
        return options[name] if plain == "True" else f"{options[name]} {shlex.quote(quoted) if quoted else plain}"

    # Not in names of files: folders of a series of runs are called runs/rank=8.
    return re.sub(r"(?<![^\s(])([a-z_]+)=(?:'([^'\n]+)'|([\w.]+))", option, text)


def _options(command: click.Command, *, opposite: bool = False) -> Iterator[tuple[str | None, str]]:
    """Parameters of a command, and of those below it, with their options, or with those that say no (`--no-report`)."""
    for below in getattr(command, "commands", {}).values():
        yield from _options(below, opposite=opposite)
    for param in command.params:
        if isinstance(param, click.Option) and (options := param.secondary_opts if opposite else param.opts):
            yield param.name, max(options, key=len)
