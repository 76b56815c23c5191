"""phi3-mlx data synthesize"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..data.options import ReadOptions
from ..data.synthesis_options import SynthesisOptions
from ..generation.request import Request
from .declare import options_of
from .options import ModelOptions, model_options, within_memory
from .progress import DataProgress
from .reading import read_input
from .steps import note_broken
from .terminal import note, say, show, show_json

_PROMPT_TOKENS = 1024  # for the plan before anything is loaded


@click.command()
@model_options
@click.option("--topics", multiple=True, metavar="FILE", help="Topics, a line each; may be repeated.")
@click.option("--seeds", multiple=True, metavar="FILE", help="Texts to make records from; may be repeated.")
@click.option(
    "-o", "--output", metavar="DIR", help="The folder to write. Run again, it goes on where it ended, or makes more."
)
@click.option("--prompt", metavar="FILE", help="Ask with this text; {topic} in it, or {text}, is the subject's place.")
@click.option(
    "--unlike", multiple=True, metavar="FILE", help="Refuse what is near a text in here too; may be repeated."
)
@options_of("options", SynthesisOptions)
@options_of("read", ReadOptions)
@click.option("--dry-run", is_flag=True, help="Show the first prompts and the form of the answers; make nothing.")
@click.option("--force", is_flag=True, help="Begin anew where an earlier run wrote.")
@within_memory
def synthesize(
    source: ModelOptions,
    topics: tuple[str, ...],
    seeds: tuple[str, ...],
    output: str | None,
    prompt: str | None,
    unlike: tuple[str, ...],
    options: SynthesisOptions,
    read: ReadOptions,
    dry_run: bool,
    force: bool,
) -> None:
    """Let a model make records about topics, or from texts.

    Needs the extras data and schema. Records near one that was made are refused, and what the model, asked again, does
    not confirm. removed.jsonl says why. Each record has its provenance: model, prompt, seed.

    \b
    phi3-mlx data synthesize --topics topics.txt -o made --kind questions
    phi3-mlx data synthesize --seeds notes -o made --kind passages --tokens 100000
    phi3-mlx data synthesize --seeds notes --kind preferences --dry-run
    """
    from ..data.synthesis import check_subjects, first_prompts, read_subjects, synthesize_data

    template = None if prompt is None else read_input(prompt)
    place = source.find()
    tokenizer = source.load_tokenizer(place)
    if dry_run:
        made_of = read_subjects(topics or None, seeds or None, read, template, options)
        _show_prompts(first_prompts(made_of, options, tokenizer))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    check_subjects(topics or None, seeds or None, read, template, options)  # before the model is loaded
    model = source.load_model(place, _PROMPT_TOKENS, Request(max_tokens=options.max_tokens))
    with DataProgress("making") as bar:
        report = synthesize_data(
            model,
            tokenizer,
            output,
            name=source.name(),
            topics=topics or None,
            seeds=seeds or None,
            prompt=template,
            unlike=unlike or None,
            force=force,
            progress=bar.update,
            **asdict(options),
            **asdict(read),
        )
    note_broken(report["broken"])
    for reason, removed in report["reasons"].items():
        say(f"refused {removed['records']:,}: {reason}")
    if report["ended_by"] != "records":
        note(f"ended by {report['ended_by']}: {report['kept']:,} records of {report['attempts']:,} attempts")
    say(f"{output}/data.jsonl: {report['kept']:,} records, {report['tokens']:,} tokens made")


def _show_prompts(shown: dict[str, Any]) -> None:
    note_broken(shown["broken"])
    for asked in shown["prompts"]:
        note(f"{asked['source']}, {asked['tokens']:,} tokens, seed {asked['seed']}")
        show(asked["prompt"])
        show()
    note(f"{shown['subjects']:,} subjects; verified by: {shown['verify']}; the answers fit this schema:")
    show_json(shown["schema"])
