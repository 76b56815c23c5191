"""phi3-mlx data score, phi3-mlx data train-filter"""

from __future__ import annotations

from typing import Any

import click

from ..data.options import ReadOptions, ScoreOptions, TrainFilterOptions, WriteOptions
from ..errors import Phi3Error
from ..generation.request import Request
from ..paths import expanded
from .declare import options_of
from .options import ModelOptions, model_options, within_memory
from .reading import read_input
from .steps import files_argument, output_option, reading_options, run_step, writing_options
from .tables import print_table
from .terminal import note, say

_AROUND = 512  # tokens of a rubric, for the plan before anything is loaded


@click.command("score")
@files_argument
@output_option
@model_options
@click.option(
    "--rubric",
    metavar="FILE",
    help="What the model is asked, with {text} where each text is put. Without it: the educational value, 0 to 5.",
)
@options_of("options", ScoreOptions)
@within_memory
@reading_options
@writing_options
def score_texts(
    files: tuple[str, ...],
    output: str,
    source: ModelOptions,
    rubric: str | None,
    options: ScoreOptions,
    read: ReadOptions,
    write: WriteOptions,
) -> None:
    """Let a model rate each text.

    The model reads a rubric and the text, and decodes nothing: the rating is the expected value of its answer. Each
    record is written with the key rating. Stopped, it goes on where it ended when it is run again. There is no
    --processes: all texts go through the batches of one engine.

    \b
    phi3-mlx data score articles.jsonl -o rated -m phi-3.5-mini-4bit
    phi3-mlx data score articles.jsonl -o rated --rubric facts.txt --scale 0,1
    phi3-mlx data score articles.jsonl -o seen --perplexity --no-rating
    """
    from ..data.rating import score_data
    from ..data.records import Records
    from ..data.rubric import EDUCATIONAL
    from ..data.score_journal import unfinished_folder
    from ..data.step import check_output_folder

    text = EDUCATIONAL if rubric is None else read_input(rubric)
    # What is wrong with the files is told before a model is loaded.
    check_output_folder(output, [Records(files, read, "scoring", None)], write)
    place = source.find()
    tokenizer = source.load_tokenizer(place)
    model = source.load_model(place, options.max_length + _AROUND, Request(max_tokens=1))
    unfinished = unfinished_folder(expanded(output))
    if unfinished.exists():
        say(f"going on from {unfinished}")
    try:
        report = run_step(output, lambda bar: score_data(
            model, tokenizer, files, output, rubric=text, scale=options.scale, rating=options.rating,
            perplexity=options.perplexity, max_length=options.max_length, raw=options.raw, name=options.name,
            field=read.field, lines=read.lines, skip_broken=read.skip_broken, compress=write.compress,
            force=write.force, progress=bar,
        ))  # fmt: skip
    except BaseException as error:
        if unfinished.exists():
            goes_on = "" if isinstance(error, Phi3Error) else "; the same command goes on from there"
            note(f"{unfinished} keeps what was scored{goes_on}")  # a refusal says itself what to do
        raise
    _tell(report)


def _tell(report: dict[str, Any]) -> None:
    if report["cut"]:
        note(f"longer than --max-length, and cut: {report['cut']:,} texts")
    for name, spread in report["scores"].items():
        lowest, highest = spread["histogram"][0]["from"], spread["histogram"][-1]["to"]
        say(f"{name}: mean {spread['mean']:.3f}, from {lowest:g} to {highest:g}")


@click.command("train-filter")
@files_argument
@output_option
@options_of("options", TrainFilterOptions)
@reading_options
@options_of("write", WriteOptions, ["force"])
def train_text_filter(
    files: tuple[str, ...], output: str, options: TrainFilterOptions, read: ReadOptions, write: WriteOptions
) -> None:
    """Learn from a rated sample which texts are good, to filter many.

    Fits a logistic regression to hashed words and pairs of words, measures it on texts that it has not learnt, and says
    how much each bound keeps. Needs the extra data.

    \b
    phi3-mlx data train-filter rated -o judge --threshold 3
    phi3-mlx data train-filter rated -o judge --top 0.2
    phi3-mlx data filter pool.jsonl -o good --classifier judge --at-least 0.7
    """
    from ..data.area import AREA_OF_CHANCE
    from ..data.filter_training import train_filter

    report = run_step(output, lambda bar: train_filter(
        files, output, label=options.label, threshold=options.threshold, top=options.top, good=options.good,
        held_out=options.held_out, group=options.group, examples=options.examples, seed=options.seed,
        field=read.field, lines=read.lines, skip_broken=read.skip_broken, force=write.force, progress=bar,
    ))  # fmt: skip
    low, high = report["auc_95"]
    held_out = report["held_out"]
    say(
        f"AUC {report['auc']:.3f} ({low:.3f} to {high:.3f}) on {held_out['good']:,} good and {held_out['bad']:,} bad "
        "texts that were held out"
    )
    if report["says_nothing"]:
        advice = "" if options.group else (
            ". If there are a good and a bad text of each article or subject, name the key with --group"
        )  # fmt: skip
        note(
            "the good texts that were held out do not score higher than the bad ones, so it gives all the same "
            f"probability: do not filter by it{advice}"
        )
    elif low <= AREA_OF_CHANCE:
        note("the interval reaches 0.5, which is chance: do not filter by it")
    shares = ("kept", "good_of_kept", "kept_of_good")
    rows = [
        [f"{row['at_least']:.2f}", *("–" if row[name] is None else f"{row[name]:.1%}" for name in shares)]
        for row in report["bounds"][1::2]
    ]
    print_table([["at least", "kept", "good of kept", "kept of good"], *rows], right={0, 1, 2, 3})
