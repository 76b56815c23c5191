"""phi3-mlx data"""

from __future__ import annotations

from typing import Any

import click

from ..data.options import (
    DecontaminateOptions,
    DedupeOptions,
    FilterOptions,
    MixOptions,
    ReadOptions,
    SplitOptions,
    WorkOptions,
    WriteOptions,
)
from .declare import options_of
from .progress import DataProgress
from .rating import score_texts, train_text_filter
from .steps import files_argument, output_option, reading_options, run_step, working_options, writing_options
from .synthesize import synthesize
from .tables import print_table
from .terminal import note, show, show_json


@click.group()
def data() -> None:
    """Look at texts for training, clean and rate them, share them out, and make more.

    FILE is a .jsonl, .txt or .md file, each perhaps with .gz or .zst, a .parquet file, a folder of such files, or "-":
    JSON lines of stdin. A step writes a folder: data.jsonl, what it removed and why (removed.jsonl), and report.json.
    So a step's folder is the next one's FILE.

    \b
    phi3-mlx data stats notes -m tiny
    phi3-mlx data split notes -o examples
    phi3-mlx tune -d examples -o adapter
    """


@data.command()
@files_argument
@click.option("-m", "--model", metavar="NAME", help="Count tokens as this model has them, and what tune would learn.")
@click.option("-o", "--output", metavar="DIR", help="Write report.json into this folder, too.")
@reading_options
@options_of("write", WriteOptions, ["force"])
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def stats(
    files: tuple[str, ...], model: str | None, output: str | None, read: ReadOptions, write: WriteOptions, as_json: bool
) -> None:
    """Say how many records there are, how long, in which scripts, and how many are there twice.

    \b
    phi3-mlx data stats notes
    phi3-mlx data stats articles.jsonl -m tiny --json
    """
    from ..data.statistics import data_stats
    from ..store.hub import resolve
    from ..text.tokenizer import read_tokenizer

    tokenizer = None if model is None else read_tokenizer(resolve(model, weights=False))
    with DataProgress("reading") as bar:
        report = data_stats(
            files,
            output,
            tokenizer=tokenizer,
            field=read.field,
            lines=read.lines,
            skip_broken=read.skip_broken,
            force=write.force,
            progress=bar.update,
        )
    if as_json:
        show_json(report, indent=1)
    else:
        _show_stats(report)


def _show_stats(report: dict[str, Any]) -> None:
    lengths = {name: report[name] for name in ("characters", "tokens") if report[name]}
    if tokens := report["tune"]["tokens"]:
        lengths["tokens to tune"] = tokens
    columns = ("total", "shortest", "longest", "mean")
    rows = [
        [name, *(f"{known[key]:,.0f}" for key in columns), *(f"{n:,}" for n in known["quantiles"].values())]
        for name, known in lengths.items()
        if known["total"]
    ]
    show(f"records           {report['read']:,}")
    show(f"exact duplicates  {report['exact_duplicates']['records']:,}")
    if report["broken"]["records"]:
        show(f"broken            {report['broken']['records']:,}")
    scripts = [f"{name} {share:.1%}" for name, share in report["scripts"].items() if share >= 0.001]
    show(f"scripts           {', '.join(scripts) or 'none'}")
    tune = report["tune"]
    learnt = "" if tune["learnt_tokens"] is None else f"; {tune['learnt_tokens']:,} tokens are learnt"
    kinds = ", ".join(f"{count:,} for {objective}" for objective, count in tune["objectives"].items())
    kinds = f" ({kinds})" if {*tune["objectives"]} - {"sft"} else ""
    show(f"tune takes        {tune['examples']:,}{kinds}, refuses {tune['refused']:,}{learnt}")
    for fault in tune["faults"][:1]:
        note(f"tune would refuse {fault}")
    show()
    quantiles = [f"{part} %" for part in report["characters"]["quantiles"]]
    print_table([["lengths in", *columns, *quantiles], *rows], range(1, 11))


@data.command()
@files_argument
@output_option
@options_of("options", SplitOptions)
@reading_options
@writing_options
@working_options
def split(
    files: tuple[str, ...],
    output: str,
    options: SplitOptions,
    read: ReadOptions,
    write: WriteOptions,
    work: WorkOptions,
) -> None:
    """Deal records out to files, by their texts.

    A record's file depends on its text and the seed alone: equal texts are never on both sides, and records that are
    added later do not move those that are there.

    \b
    phi3-mlx data split articles.jsonl -o parts
    phi3-mlx data split articles.jsonl -o parts --part train=0.9 --part test=0.1
    """
    from ..data.sharing import split_data

    run_step(output, lambda bar: split_data(
        files, output, part=options.part, seed=options.seed, field=read.field, lines=read.lines,
        skip_broken=read.skip_broken, compress=write.compress, force=write.force,
        processes=work.processes, progress=bar,
    ))  # fmt: skip


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE=SHARE...")
@output_option
@options_of("options", MixOptions)
@reading_options
@writing_options
def mix(files: tuple[str, ...], output: str, options: MixOptions, read: ReadOptions, write: WriteOptions) -> None:
    """Put records of several files together, in the proportions of their shares from beginning to end.

    The mix ends where a file has no records left.

    \b
    phi3-mlx data mix articles.jsonl=0.8 notes=0.2 -o mixed
    phi3-mlx data mix articles.jsonl=3 notes=1 -o mixed --by characters --epochs 4
    """
    from ..data.sharing import mix_data

    shares: dict[Any, Any] = {}
    for file in files:
        path, equals, share = file.rpartition("=")
        if not equals or not path:
            raise click.UsageError(f"{file!r} has no share; write {file.rstrip('=')}=0.5")
        if path in shares:
            raise click.UsageError(f"{path} is given twice; give it once, with the sum of the shares")
        shares[path] = share
    run_step(output, lambda bar: mix_data(
        shares, output, by=options.by, records=options.records, epochs=options.epochs, shuffle=options.shuffle,
        seed=options.seed, field=read.field, lines=read.lines, skip_broken=read.skip_broken,
        compress=write.compress, force=write.force, progress=bar,
    ))  # fmt: skip


@data.command()
@files_argument
@output_option
@options_of("options", DedupeOptions)
@reading_options
@writing_options
def dedupe(files: tuple[str, ...], output: str, options: DedupeOptions, read: ReadOptions, write: WriteOptions) -> None:
    """Keep the first of records that say the same, or nearly.

    Near duplicates need the extra data. removed.jsonl names the record that was kept, and how near it is.

    \b
    phi3-mlx data dedupe articles.jsonl -o unique
    phi3-mlx data dedupe articles.jsonl -o unique --exact
    """
    from ..data.duplicates import dedupe_data

    run_step(output, lambda bar: dedupe_data(
        files, output, threshold=options.threshold, ngram=options.ngram, exact=options.exact, field=read.field,
        lines=read.lines, skip_broken=read.skip_broken, compress=write.compress, force=write.force, progress=bar,
    ))  # fmt: skip


@data.command("filter")
@files_argument
@output_option
@options_of("options", FilterOptions)
@reading_options
@writing_options
@working_options
def filter_(
    files: tuple[str, ...],
    output: str,
    options: FilterOptions,
    read: ReadOptions,
    write: WriteOptions,
    work: WorkOptions,
) -> None:
    """Leave out poor records, and mask personal data.

    The rules of Gopher's and C4's authors are for English web pages. removed.jsonl names for each record the rule, and
    its value.

    \b
    phi3-mlx data filter pages.jsonl -o good --rules gopher,c4,pii
    phi3-mlx data filter notes -o good --rules gopher,-stop-words --min-words 20
    phi3-mlx data filter chats.jsonl -o safe --rules email,phone --pii drop
    phi3-mlx data filter pool.jsonl -o good --classifier judge --at-least 0.7
    """
    from ..data.filtering import filter_data

    run_step(output, lambda bar: filter_data(
        files, output, rules=options.rules, classifier=options.classifier, at_least=options.at_least, pii=options.pii,
        min_characters=options.min_characters,
        max_characters=options.max_characters, min_words=options.min_words, max_words=options.max_words,
        field=read.field, lines=read.lines, skip_broken=read.skip_broken, compress=write.compress, force=write.force,
        processes=work.processes, progress=bar,
    ))  # fmt: skip


@data.command()
@files_argument
@output_option
@click.option(
    "--against", required=True, multiple=True, metavar="FILE", help="A file of an evaluation; may be repeated."
)
@options_of("options", DecontaminateOptions)
@reading_options
@writing_options
@working_options
def decontaminate(
    files: tuple[str, ...],
    output: str,
    against: tuple[str, ...],
    options: DecontaminateOptions,
    read: ReadOptions,
    write: WriteOptions,
    work: WorkOptions,
) -> None:
    """Leave out records that hold what an evaluation asks.

    \b
    phi3-mlx data decontaminate articles.jsonl -o clean --against questions.jsonl
    """
    from ..data.contamination import decontaminate_data

    run_step(output, lambda bar: decontaminate_data(
        files, output, against, ngram=options.ngram, against_field=options.against_field, field=read.field,
        lines=read.lines, skip_broken=read.skip_broken, compress=write.compress, force=write.force,
        processes=work.processes, progress=bar,
    ))  # fmt: skip


@data.command()
@files_argument
@click.option("-m", "--model", required=True, metavar="NAME", help="The model whose tokenizer is used.")
@output_option
@reading_options
@options_of("write", WriteOptions, ["force"])
@working_options
def tokenize(
    files: tuple[str, ...], model: str, output: str, read: ReadOptions, write: WriteOptions, work: WorkOptions
) -> None:
    """Write token shards for pretraining.

    The folder holds the ids of all texts, each with its end, and tokens.json, which says how many there are and with
    which tokenizer they were made. After a kill the same command does only the rest.

    \b
    phi3-mlx data tokenize notes -m tiny -o shards
    phi3-mlx pretrain tiny -d shards -o model
    """
    from ..data.tokens import tokenize_data
    from ..generation.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    run_step(output, lambda bar: tokenize_data(
        files, output, tokenizer, field=read.field, lines=read.lines, skip_broken=read.skip_broken, force=write.force,
        processes=work.processes, progress=bar,
    ))  # fmt: skip


data.add_command(score_texts)
data.add_command(train_text_filter)
data.add_command(synthesize)
