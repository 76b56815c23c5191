"""Tools of a chat: read from the file that the user names, shown, and run if the user allows it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..values import texts
from .reading import read_input
from .terminal import note, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..generation.request import Request
    from ..generation.tool_turns import ToolTurn
    from ..text.tokenizer import Tokenizer
    from ..text.tool_calls import ToolCall
    from ..text.tools import Tool

_LONGEST_RESULT = 200  # characters of a result that are shown

tools_option = click.option(
    "--tools",
    metavar="FILE",
    help="Let the model call the functions of this Python file, after asking you; of a JSON file (OpenAI's form) calls "
    "are shown and not run.",
)
yes_option = click.option("--yes", is_flag=True, help="Run what --tools has without asking.")


def tool_turn(path: str | None, yes: bool, tokenizer: Tokenizer, request: Request) -> ToolTurn | None:
    """What the model may call in each turn, None without a file. Raises OptionError for what cannot be a tool."""
    if path is None:
        if yes:
            raise OptionError("--yes has no effect without --tools; leave it out")
        return None
    from ..generation.tool_turns import ToolTurn
    from ..text.grammar import check_form
    from ..text.tool_use import use_tools
    from ..text.tools import read_tools

    known = read_tools(_tools_of(path), f"--tools {path}")
    if not known:
        advice = "list one" if path.endswith(".json") else "define one with type hints, its name without an underscore"
        raise OptionError(f"--tools {path} has no function; {advice}")
    use = use_tools(tokenizer, known)
    runs = all(tool.function is not None for tool in use.tools)
    turn = ToolTurn(use, _asking(use.tools, yes) if runs else None, notify=note)
    for form in turn.forms(request.form):
        check_form(form)
    if not use.trained:
        note("this model was not trained for tools: its calls have the right form, but may make little sense")
    return turn


def say_call(call: ToolCall) -> None:
    """A call, on stderr."""
    say(f"call: {call.name} {call.text}")


def _asking(tools: tuple[Tool, ...], yes: bool) -> Callable[[ToolCall], Any]:
    """What runs a call if the user allows it, and shows its result."""
    functions = {tool.name: tool for tool in tools}

    def run(call: ToolCall) -> Any:
        from ..text.python_values import as_result

        if not (yes or _allowed(call)):
            return {"error": "the user did not allow this call"}
        value = functions[call.name].call(call.arguments)
        text = as_result(value)
        say(f"result: {text if len(text) <= _LONGEST_RESULT else f'{text[:_LONGEST_RESULT]}...'}")
        return value

    return run


def _allowed(call: ToolCall) -> bool:
    if not sys.stdin.isatty():
        note(f"{call.name} was not run: nobody can be asked here; --yes runs tools without asking")
        return False
    say(f"Run {call.name}? [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        say()
        return False


def _tools_of(path: str) -> Any:
    """The tools in a file: its text if that is JSON, the functions of a Python file."""
    if path.endswith(".json"):
        return read_input(path)
    if not path.endswith(".py"):
        raise OptionError(f"--tools {path} is neither a .py nor a .json file; give one of these")
    module = _module(path)
    public = getattr(module, "__all__", None)
    if public is not None:
        names = texts(public, f"__all__ of {path}")
        if missing := next((name for name in names if not hasattr(module, name)), None):
            raise OptionError(f"--tools {path} has no {missing}, which its __all__ names")
        return [getattr(module, name) for name in names]
    functions = inspect.getmembers(
        module, lambda value: inspect.isfunction(value) and value.__module__ == module.__name__
    )
    return [function for name, function in functions if not name.startswith("_")]


def _module(path: str) -> ModuleType:
    """The Python file as a module, which may import what lies beside it. OptionError, with the place, if it fails."""
    if not os.path.isfile(path):
        raise OptionError(f"--tools {path} is no file; give a .py or a .json file")
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(f"phi3_mlx_tools.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where type hints are looked up
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        spec.loader.exec_module(module)
    except SystemExit:
        raise OptionError(f"--tools {path} ends the program when it is read; let it define functions alone") from None
    except Exception as error:  # the user's program may fail in any way
        here = os.path.abspath(path)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
        place = f" in line {lines[-1]}" if lines else ""
        raise OptionError(f"--tools {path} fails{place}: {type(error).__name__}: {error}") from error
    return module
