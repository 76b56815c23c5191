"""phi3-mlx generate"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..errors import PromptError
from .declare import option_of
from .options import (
    REQUEST_FIELDS,
    ModelOptions,
    answer_options,
    answering_model_options,
    drafts_text,
    note_cut,
    note_idle,
    note_unwritten,
    open_prefixes,
    prefixes_option,
)
from .progress import PrefillProgress
from .reading import check_text, read_input
from .steering import read_steering_options, steer_layers_option, steer_option, steered
from .terminal import answer_writer, note, say, show, show_json

if TYPE_CHECKING:
    from ..generation.chunks import Chunk
    from ..generation.request import Request


@click.command()
@answering_model_options
@click.option("-p", "--prompt", metavar="TEXT", help='What to answer; "-" reads it from stdin.')
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help='A text file to put after the prompt; "-" is stdin; may be repeated.',
)
@click.option(
    "--cache",
    metavar="FILE",
    help="Ask about a text that `phi3-mlx cache build` has read, with the same model. You may repeat the text with -f "
    "to check that it is the same.",
)
@prefixes_option
@click.option("--system", metavar="TEXT", help="A system message: how the model should behave.")
@option_of(REQUEST_FIELDS["raw"])
@steer_option
@steer_layers_option
@answer_options
@click.option("--stats", is_flag=True, help="Print speed and memory to stderr afterwards.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, tokens with log-probabilities, figures.")
def generate(
    source: ModelOptions,
    prompt: str | None,
    files: tuple[str, ...],
    cache: str | None,
    prefixes: str | None,
    system: str | None,
    steer: tuple[str, ...],
    steer_layers: str | None,
    request: Request,
    stats: bool,
    as_json: bool,
) -> None:
    """Answer one prompt.

    \b
    phi3-mlx generate -p "Why is the sky blue?" -m phi-3.5-mini-4bit
    phi3-mlx generate -f notes.txt -p "Summarise these notes."
    git diff | phi3-mlx generate -p "Write a commit message for this diff:" -f -

    -m mlx-lm:OWNER/REPO answers with a model of another family, which mlx-lm's code runs. Exactness is promised for the
    Phi family alone.
    """
    note_idle(request)
    raw = request.raw
    if cache is not None and prefixes is not None:
        raise click.UsageError("--prefixes has no effect beside --cache; leave out one of the two")
    if steer and (cache or prefixes):
        read = "--cache" if cache else "--prefixes"
        raise click.UsageError(f"{read} was read without --steer; leave out one of the two")
    if raw and (system or cache):
        raise click.UsageError("--raw sends no template, so it has no place for --system or --cache")
    if cache is not None:
        if request.kv_bits is not None:
            raise click.UsageError(f"{cache} has its own bits, so --kv-bits has no effect; leave it out")
        from ..generation.prompt_cache import PromptCache, about_document, read_document

        document, bits = read_document(cache)
        if bits is not None:
            request = dataclasses.replace(request, kv_bits=(bits.keys, bits.values), kv_group_size=bits.group_size)
        if system is not None and system != document.system:
            raise click.UsageError(f"{cache} begins with another system message; leave --system out, or rebuild it")
        system = document.system
        if document.model and click.get_current_context().get_parameter_source("model") is ParameterSource.DEFAULT:
            source = dataclasses.replace(source, model=document.model)
        if files and prompt is None:
            raise click.UsageError(f"-f is the text of {cache} here, and no question; give that with -p")
        text = about_document(_joined(map(read_input, files)) if files else document.text, _prompt(prompt, (), raw))
    else:
        text = _prompt(prompt, files, raw)
    from ..generation.answers import Answers, encode_prompt

    place = source.find_answering(request, cache=cache, prefixes=prefixes, steer=steer)
    steering = read_steering_options(steer, steer_layers, place)
    store = open_prefixes(prefixes, 1)  # one prompt takes nothing from memory
    tokenizer = source.load_tokenizer(place)
    messages = [{"role": "system", "content": check_text(system, "--system")}] if system else []
    messages.append({"role": "user", "content": text})
    ids = encode_prompt(tokenizer, text if raw else messages, raw=raw, notify=note)
    drafting = source.find_draft(tokenizer)
    model = source.load_model(place, len(ids), request, kept=cache is not None, draft=drafting)
    draft = source.load_draft(drafting)
    prompt_cache = None
    if cache is not None:
        prompt_cache = PromptCache.load(cache, model)
        prompt_cache.check_prefix(ids, cache)
    with steered(model, steering), PrefillProgress(len(ids)) as progress:
        answer = Answers(
            model,
            tokenizer,
            [ids],
            request,
            draft=draft,
            prompt_cache=prompt_cache,
            prefixes=store,
            on_prefill=progress.update,
        )
        last = _print_json(source.model, place.code, answer.chunks()) if as_json else _print_text(answer.chunks())
    note_cut(request, last)
    note_unwritten(store)
    if stats:
        from ..sizes import size_text

        say(
            f"prompt {last.prompt_tokens:,} tokens ({last.prefilled_tokens:,} read now), {last.prompt_tps:,.1f} tok/s; "
            f"answer {last.generation_tokens:,} tokens, {last.generation_tps:,.1f} tok/s"
            f"{drafts_text(last)}; "
            f"peak memory {size_text(last.peak_memory)}"
        )


def _prompt(prompt: str | None, files: Sequence[str], raw: bool) -> str:
    if [prompt, *files].count("-") > 1:
        raise click.UsageError("- stands for stdin more than once among -p and -f; give it once")
    if prompt is None and not files:
        if sys.stdin.isatty():
            raise click.UsageError('nothing to answer; give -p "TEXT", -f FILE, or text on stdin')
        files = ["-"]
    parts = [read_input("-") if prompt == "-" else check_text(prompt or "", "--prompt"), *map(read_input, files)]
    text = "".join(parts) if raw else _joined(parts)
    if not text.strip():
        raise PromptError('the prompt is empty; give -p "TEXT", -f FILE, or text on stdin')
    return text


def _joined(parts: Iterable[str]) -> str:
    """Texts with an empty line between them."""
    return "\n\n".join(part.replace("\r\n", "\n").strip("\n") for part in parts if part.strip())


def _print_text(chunks: Iterator[Chunk]) -> Chunk:
    ended = True
    try:
        with answer_writer() as write:
            for chunk in chunks:
                write(chunk.text)
                ended = chunk.text.endswith("\n") if chunk.text else ended
                last = chunk
    finally:
        if not ended:
            show()
    return last


def _print_json(model: str, code: str, chunks: Iterator[Chunk]) -> Chunk:
    seen: list[Chunk] = []
    try:
        seen.extend(chunks)
    finally:
        if seen:  # what was said before Ctrl-C too
            figures = dataclasses.asdict(seen[-1])
            for key in ("text", "token", "logprob"):
                del figures[key]
            tokens = [{"id": chunk.token, "text": chunk.text, "logprob": chunk.logprob} for chunk in seen]
            answer = {
                "model": model,
                "code": code,
                "text": "".join(chunk.text for chunk in seen),
                **figures,
                "tokens": tokens,
            }
            show_json(answer)
    return seen[-1]
