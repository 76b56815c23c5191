"""phi3-mlx cache"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..errors import PromptError
from .options import ModelOptions, memory_options, model_options
from .progress import PrefillProgress
from .reading import check_text, read_input
from .terminal import note, say

if TYPE_CHECKING:
    from ..generation.request import Request


@click.group()
def cache() -> None:
    """Read a long text once, for many questions.

    \b
    phi3-mlx cache build -m phi-3.5-mini-4bit -f book.txt -o book.cache
    phi3-mlx generate --cache book.cache -p "Who is the heroine?"
    """


@cache.command()
@model_options
@click.option("-f", "--file", required=True, metavar="FILE", help='The text, UTF-8; "-" is stdin.')
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="The cache to write. It replaces an older cache, but no other file.",
)
@click.option("--system", metavar="TEXT", help="A system message, used for every question.")
@memory_options
def build(source: ModelOptions, file: str, output: str, system: str | None, request: Request) -> None:
    """Read a text and keep what was read in a file.

    \b
    phi3-mlx cache build -m phi-3.5-mini-4bit -f book.txt -o book.cache
    phi3-mlx generate --cache book.cache -p "Who is the heroine?"
    """
    text = read_input(file)
    if not text.strip():
        raise PromptError(f"{file} is empty; give a text")
    if system:
        check_text(system, "--system")
    from ..engine.cache_file import Document
    from ..generation.prompt_cache import PromptCache, check_writable, document_ids
    from ..sizes import size_text

    check_writable(output)
    place = source.find()
    tokenizer = source.load_tokenizer(place)
    document = Document(text, system, source.name())
    ids = document_ids(tokenizer, document, notify=note)
    model = source.load_model(place, len(ids), replace(request, max_tokens=1))  # nothing is answered
    prompt_cache = PromptCache(model, kv_bits=request.kv_bits, kv_group_size=request.kv_group_size, document=document)
    with PrefillProgress(len(ids)) as progress:
        prompt_cache.read(ids, force=request.force, on_prefill=progress.update)
    prompt_cache.save(output)
    say(f"{output}: {len(ids):,} tokens, {size_text(prompt_cache.nbytes)} of keys and values")
