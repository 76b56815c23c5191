"""The command `phi3-mlx`. One file a command, imported when it is called, so that --help is instant."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from .. import __version__
from ..errors import Phi3Error
from .options import as_typed
from .terminal import say, take_all_characters

# Command -> what it does, so that the list of commands imports none of them.
_COMMANDS = {
    "generate": "Answer one prompt.",
    "chat": "Chat with a model.",
    "serve": "Serve models over HTTP, to OpenAI's clients.",
    "convert": "Convert a checkpoint (Hugging Face, MLX, GGUF) to a small MLX model.",
    "compare": "Compare two models on a text: perplexity, KL divergence.",
    "eval": "Ask a model lm-eval's tasks, or your own questions.",
    "data": "Look at texts for training, clean them, and share them out.",
    "pretrain": "Train a model from random weights on token shards.",
    "tune": "Fine-tune a model on your examples.",
    "fuse": "Merge an adapter into its model.",
    "export": "Write a model as a GGUF file, for llama.cpp and ollama.",
    "adapter": "Import adapters from PEFT, or export to it.",
    "publish": "Upload a model, an adapter or GGUF files to the Hugging Face hub.",
    "cache": "Read a long text once, for many questions.",
    "plan": "Show what fits in memory, at which length and bits.",
    "models": "List the models known by a short name, and what is on this disk.",
    "doctor": "Check this machine: Python, MLX and its device, memory, disk, packages.",
}
# What was forgotten where an argument stands alone.
_STRAY = {
    "generate": "-p",
    "chat": "-m",
    "serve": "-m",
    "plan": "-m",
    "eval": "--tasks",
    "tune": "-d",
    "pretrain": "-d",
    "convert": "-o",
    "fuse": "--adapter",
    "export": "-m",
    "build": "-f",
}


class _Commands(click.Group):
    """Finds `phi3_mlx.cli.NAME.NAME` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if near and args[0] not in _COMMANDS:
            ctx.fail(f"no such command {args[0]!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return getattr(import_module(f".{name}", __name__), name) if name in _COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="phi3-mlx", message="%(prog)s %(version)s")
def cli() -> None:
    """Run Microsoft's Phi-3 models with MLX: exact at every length, in bounded memory.

    \b
    phi3-mlx generate -p "Tell me a story about a duck and a frog."
    phi3-mlx generate -m phi-3.5-mini-4bit -f letter.txt -p "Answer this letter."
    phi3-mlx chat -m phi-3.5-mini-4bit

    Every command has -h. Text goes to stdout, everything else to stderr. PHI3_MLX_DEBUG=1 shows tracebacks.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 141 closed pipe."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (<&-, >&-)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    take_all_characters()
    try:
        code = _run(list(sys.argv[1:] if args is None else args))
        if args is None:  # nothing is left that another Ctrl-C could stop; Python would print a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # a second one, while the first was told
        code = 130
    sys.exit(code)


def _run(given: list[str]) -> int:
    """Run the command line; its exit code."""
    try:
        # Not cli.main(): it would turn a closed pipe into a silent exit.
        with cli.make_context("phi3-mlx", list(given)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _say("the output was closed, so the work was stopped", 141)
    except (KeyboardInterrupt, click.Abort):
        say()
        return _say("stopped by Ctrl-C", 130)
    except click.ClickException as error:
        return _refuse(error)
    except Exception as error:
        if os.environ.get("PHI3_MLX_DEBUG") == "1":
            raise
        return _say(_in_a_line(error, given), error.exit_code if isinstance(error, Phi3Error) else 1)


def _refuse(error: click.ClickException) -> int:
    """Say what click finds wrong with the command line; the exit code."""
    message = error.format_message()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(message)
        return error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "phi3-mlx"
        message = message.rstrip(".")
        if "unexpected extra argument" in message and (option := _STRAY.get(command.split()[-1])):
            message += f"; {option} goes before it"
        message += f"{' See' if message.endswith('?') else '; see'} {command} -h"
    return _say(message, error.exit_code)


def _in_a_line(error: Exception, given: Sequence[str]) -> str:
    """What failed, with the options of the command that was given where Python has names."""
    if isinstance(error, Phi3Error):
        command = next((cli.get_command(click.Context(cli), arg) for arg in given if arg in _COMMANDS), None)
        return as_typed(error, command or cli)
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, ImportError) and "libmlx" in str(error):  # on Linux `mlx` comes without a backend
        return 'MLX has no backend here; pip install "phi3-mlx[cpu]", or "phi3-mlx[cuda]" with an NVIDIA GPU'
    message = f"unexpected {type(error).__name__}: {error}; PHI3_MLX_DEBUG=1 shows the traceback"
    return message.replace("\n", " ")


def _say(message: str, code: int) -> int:
    say(f"phi3-mlx: {message}")
    return code
