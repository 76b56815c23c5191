"""A Modelfile, from which `ollama create` makes a model of a GGUF file: template, stop strings, context, adapter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..config import Config
from ..errors import OptionError
from ..store.atomic import replace_file
from ..text.tokenizer import Tokenizer
from .turns import turns_of

_LONG_CONTEXT = 4  # times the original length: the cache of the longest would fill most machines' memory


def write_modelfile(
    gguf: Path, tokenizer: Tokenizer, config: Config, *, base: Path | None = None, longrope: str = "short"
) -> Path:
    """Write `NAME.Modelfile` beside `gguf`, NAME.gguf; returns its path. Raises OptionError and OSError.

    `base`: the model's GGUF file, where `gguf` is an adapter of it. `longrope` "short" keeps the context within the
    original length, where llama.cpp takes LongRoPE's short factors; "long" goes beyond, where it takes the long ones
    for every prompt.
    """
    path = gguf.with_suffix(".Modelfile")
    replace_file(path, modelfile_text(gguf, tokenizer, config, base=base, longrope=longrope).encode())
    return path


def modelfile_text(
    gguf: Path, tokenizer: Tokenizer, config: Config, *, base: Path | None = None, longrope: str = "short"
) -> str:
    """The text of the Modelfile of `gguf`, which need not be there; see `write_modelfile`."""
    name = re.sub(r"[^\w.-]", "-", gguf.stem.lower(), flags=re.ASCII)  # what ollama takes for one
    lines = [f"# ollama create {name} -f {shlex.quote(gguf.with_suffix('.Modelfile').name)}"]
    if base is None:
        lines.append(f"FROM {_quoted(f'./{gguf.name}')}")
    else:
        lines += [f"FROM {_quoted(f'./{base}')}", f"ADAPTER {_quoted(f'./{gguf.name}')}"]
    turns = turns_of(tokenizer)
    if turns is None:
        lines.append("# The chat template is none of the Phi family's, so ollama guesses it from the GGUF file's")
    else:
        bos = _bos(tokenizer)
        lines += [f"# The turns of {turns[0]}", f'TEMPLATE """{bos}{turns[1].go_template()}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stop_strings(tokenizer)]
    context, why = context_of(config, longrope)
    return "\n".join([*lines, *(f"# {line}" for line in why), f"PARAMETER num_ctx {context}", ""])


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template is one that is known in ollama's form."""
    return turns_of(tokenizer) is not None


def stop_strings(tokenizer: Tokenizer) -> list[str]:
    """What ends an answer, as text: the control tokens that do."""
    return [token.content for token in tokenizer.added_tokens.values() if token.id in tokenizer.stop_ids]


def context_of(config: Config, longrope: str) -> tuple[int, list[str]]:
    """(tokens of the context, what is to be said of it). OptionError for "long" where LongRoPE has no two regimes."""
    if longrope not in ("short", "long"):
        raise OptionError(f"longrope={longrope!r} is neither 'short' nor 'long'")
    original, longest = config.original_max_position_embeddings, config.max_position_embeddings
    if config.longrope is None or longest <= original:
        if longrope == "long":
            raise OptionError(f"longrope='long' is for models with LongRoPE, and this {config.model_type} has none")
        if config.sliding_window is not None and config.sliding_window < longest:
            return longest, [f"llama.cpp leaves out the window of {config.sliding_window} tokens: longer texts differ"]
        return longest, []
    if longrope == "short":
        return original, [f"Above {original} llama.cpp takes LongRoPE's long factors, for short prompts too"]
    return min(longest, _LONG_CONTEXT * original), [
        f"Above {original}, so that llama.cpp takes LongRoPE's long factors: prompts of up to {original} tokens differ",
        f"Up to {longest}, as memory allows",
    ]


def _bos(tokenizer: Tokenizer) -> str:
    """BOS where the template writes it and llama.cpp would not."""
    bos = tokenizer.special_tokens.get("bos_token")
    template = tokenizer.chat_template or ""
    return bos if bos and "bos_token" in template and not tokenizer.add_bos_token else ""


def _quoted(value: str) -> str:
    if any(character in value for character in '"\n\r'):
        raise OptionError(f"{value!r} cannot stand in a Modelfile; name the file without quotes and line ends")
    return f'"{value}"'
