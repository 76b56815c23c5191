"""phi3-mlx chat"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from ..errors import Phi3Error
from .options import ModelOptions, SamplingOptions, decode_text, model_options, sampling_options

if TYPE_CHECKING:
    from ..conversation import Conversation

_HELP = """\
/reset         forget the conversation
/system TEXT   begin anew with this system message
/save FILE     write the conversation as JSON messages
/help          this list
/exit          leave (Ctrl-D too); Ctrl-C stops an answer and keeps the chat"""


@click.command()
@model_options
@click.option("--system", metavar="TEXT", help="A system message: how the model should behave.")
@sampling_options(max_tokens=1024)
@click.option("--stats", is_flag=True, help="Tokens read and speed on stderr after each answer.")
def chat(source: ModelOptions, system: str | None, sampling: SamplingOptions, stats: bool) -> None:
    """Talk with a model; it remembers the conversation.

    A later turn reads only its own tokens: what was said before stays in the cache. Inside, /help lists the commands.
    """
    from ..conversation import Conversation

    model, tokenizer = source.load()
    note = lambda sentence: click.echo(f"note: {sentence}", err=True)  # noqa: E731
    conversation = Conversation(model, tokenizer, system=system, notify=note)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        click.echo(f"{source.model}. /help lists the commands, Ctrl-D leaves.", err=True)
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            click.echo(err=True)  # a line begun and given up
            continue
        if line is None or line.strip() == "/exit":
            return
        try:
            if line.startswith("/"):
                _command(conversation, line)
            elif line.strip():
                _answer(conversation, line, sampling, stats)
        except (Phi3Error, OSError) as error:
            if not sys.stdin.isatty() or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"phi3-mlx: {error}", err=True)


def _read_line() -> str | None:
    """The next line; None at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        return decode_text(line, "stdin").rstrip("\r\n") if line else None
    try:
        return input("> ")
    except EOFError:
        click.echo(err=True)
        return None


def _answer(conversation: Conversation, text: str, sampling: SamplingOptions, stats: bool) -> None:
    chunk = None
    try:
        with closing(conversation.send(text, **dataclasses.asdict(sampling))) as chunks:
            for chunk in chunks:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        click.echo(" [stopped]", err=True, nl=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stats and chunk:
        click.echo(
            f"prompt {chunk.prompt_tokens:,} tokens, {chunk.prefilled_tokens:,} of them new; "
            f"answer {chunk.generation_tokens:,} tokens, {chunk.generation_tps:,.1f} tok/s",
            err=True,
        )


def _command(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/reset":
        system = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
        conversation.reset(system)
        click.echo("The conversation is forgotten.", err=True)
    elif name == "/system" and argument:
        conversation.reset(argument)
        click.echo("A new conversation with this system message.", err=True)
    elif name == "/save" and argument:
        with open(argument, "w", encoding="utf-8") as file:
            json.dump(conversation.messages, file, ensure_ascii=False, indent=2)
            file.write("\n")
        click.echo(f"{len(conversation.messages)} messages written to {argument}.", err=True)
    elif name == "/help":
        click.echo(_HELP, err=True)
    else:
        click.echo(f"{line!r} is no command here; /help lists them", err=True)
