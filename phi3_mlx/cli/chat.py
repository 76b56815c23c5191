"""phi3-mlx chat"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import files
from ..errors import MemoryLimitError, Phi3Error, PromptError
from ..store.atomic import replace_file
from .options import (
    ModelOptions,
    answer_options,
    answering_model_options,
    as_typed,
    drafts_text,
    note_cut,
    note_idle,
    note_unwritten,
    open_prefixes,
    prefixes_option,
)
from .reading import check_text, decode_text
from .steering import read_steering_options, steer_layers_option, steer_option, steered
from .terminal import answer_writer, note, say, show
from .tools import say_call, tool_turn, tools_option, yes_option

if TYPE_CHECKING:
    from ..generation.conversation import Conversation
    from ..generation.request import Request
    from ..generation.tool_turns import ToolTurn
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

_HELP = """\
/reset         forget the conversation
/system TEXT   start over with this system message
/save FILE     write the conversation as JSON messages
/help          this list
/exit          leave (/quit, /bye and Ctrl-D too); Ctrl-C stops an answer and keeps the chat"""


@click.command()
@answering_model_options
@click.option("--system", metavar="TEXT", help="A system message: how the model should behave.")
@prefixes_option
@steer_option
@steer_layers_option
@answer_options
@tools_option
@yes_option
@click.option("--stats", is_flag=True, help="Tokens read and speed on stderr after each answer.")
def chat(
    source: ModelOptions,
    system: str | None,
    prefixes: str | None,
    steer: tuple[str, ...],
    steer_layers: str | None,
    request: Request,
    tools: str | None,
    yes: bool,
    stats: bool,
) -> None:
    """Chat with a model.

    A later turn reads only its own tokens: what was said before stays in the cache. Inside, /help lists the commands.
    -m mlx-lm:OWNER/REPO is a model of another family; exactness is promised for the Phi family alone.
    """
    note_idle(request)
    if steer and prefixes:
        raise click.UsageError("--prefixes was read without --steer; leave out one of the two")
    from ..generation.conversation import Conversation

    system = check_text(system, "--system") if system else None
    place = source.find_answering(request, prefixes=prefixes, steer=steer)
    steering = read_steering_options(steer, steer_layers, place)
    store = open_prefixes(prefixes)
    tokenizer = source.load_tokenizer(place)
    turn = tool_turn(tools, yes, tokenizer, request)
    drafting = source.find_draft(tokenizer)
    model = source.load_model(place, 1, request, draft=drafting)
    draft = source.load_draft(drafting)
    click.get_current_context().with_resource(steered(model, steering))
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        kv_bits=request.kv_bits,
        kv_group_size=request.kv_group_size,
        prefixes=store,
        force=request.force,
        notify=note,
    )
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # some Pythons are built without it
            import readline  # noqa: F401  (line editing and history for input())
        say(f"{source.model}. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = _read_line()
            if line is None or line.strip() in ("/exit", "/quit", "/bye"):
                note_unwritten(store)
                return
            if line.startswith("/"):
                _command(conversation, line)
            elif line.strip():
                _answer(conversation, line, request, draft, turn, stats)
        except KeyboardInterrupt:
            if not typed:
                raise
            say()
        except Phi3Error as error:
            if not typed:
                raise
            full = isinstance(error, PromptError | MemoryLimitError)
            hint = "; /reset starts over" if full and conversation.messages else ""
            say(f"phi3-mlx: {as_typed(error, click.get_current_context().command)}{hint}")


def _read_line() -> str | None:
    """The next line; None at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline(files.LARGEST + 1)
        if len(line) > files.LARGEST:
            raise PromptError(f"a line of stdin is longer than {files.LARGEST // 10**6} MB; end lines where turns end")
        encoding = files.encoding_of(line)
        if encoding != "utf-8":  # its lines do not end where bytes say so
            name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells it
            raise PromptError(f"stdin is {name} text; pipe it through iconv -f {name} -t UTF-8")
        return decode_text(line, "stdin").rstrip("\r\n") if line else None
    try:
        if sys.stdout.isatty():
            return check_text(input("> "), "that line")
        say("> ", end="")
        return check_text(input(), "that line")
    except UnicodeDecodeError as error:
        raise PromptError("that line is not UTF-8 text; type it again") from error
    except EOFError:
        say()
        return None


def _answer(
    conversation: Conversation,
    text: str,
    request: Request,
    draft: tuple[Model, Tokenizer] | None,
    tools: ToolTurn | None,
    stats: bool,
) -> None:
    chunk = None
    try:
        with (
            contextlib.closing(conversation.ask(text, request, draft=draft, tools=tools)) as chunks,
            answer_writer() as write,
        ):
            for chunk in chunks:
                write(chunk.text)
                for call in chunk.calls:
                    say_call(call)
    except KeyboardInterrupt:
        say(" [stopped]", end="")
    show()
    if chunk:
        note_cut(request, chunk)
    if stats and chunk:
        say(
            f"prompt {chunk.prompt_tokens:,} tokens, {chunk.prefilled_tokens:,} of them new; "
            f"answer {chunk.generation_tokens:,} tokens, {chunk.generation_tps:,.1f} tok/s{drafts_text(chunk)}"
        )


def _command(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/reset":
        system = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
        conversation.reset(system)
        say("The conversation is forgotten.")
    elif name in ("/system", "/save") and not argument:
        say(f"{name} needs {'a text' if name == '/system' else 'a file name'} after it")
    elif name == "/system":
        conversation.reset(argument)
        say("A new conversation with this system message.")
    elif name == "/save":
        _save(conversation, os.path.expanduser(argument))
        say(f"{len(conversation.messages)} messages written to {argument}.")
    elif name == "/help":
        say(_HELP)
    else:
        say(f"{line!r} is no command here; /help lists them")


def _save(conversation: Conversation, path: str) -> None:
    """Write the messages; a file that is there already is replaced only by a whole one."""
    text = files.json_text(conversation.messages, indent=2)
    try:
        replace_file(Path(path), f"{text}\n".encode())
    except OSError as error:
        raise Phi3Error(f"{path} cannot be written: {error.strerror}; name another file") from error
