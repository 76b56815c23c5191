"""The tasks of `phi3-mlx eval` that lm-eval does not ask: MT-bench, and those like RULER's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..evaluation.options import EvalOptions, MtBenchOptions, RulerOptions
from ..generation.request import Request
from .options import ModelOptions
from .progress import LeftProgress, QuestionProgress
from .tables import print_table
from .terminal import note, say, show, show_json

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

MT_BENCH, RULER = "mt_bench", "ruler"
_QUESTION_TOKENS = 2048  # of both turns before the last answer, for the plan before anything is loaded
_FOUND_TOKENS = 128  # of a RULER-like answer at most


def asked_apart(names: Sequence[str]) -> str | None:
    """Which of the two ways the tasks are asked in; None: lm-eval's. UsageError for tasks of several ways."""
    from ..evaluation.retrieval import is_ruler_task

    ways = {MT_BENCH if name == MT_BENCH else RULER if is_ruler_task(name) else None for name in names}
    if len(ways) > 1:
        raise click.UsageError(f"{MT_BENCH}, {RULER}'s tasks and other tasks are asked apart; give one kind at a time")
    way = ways.pop() if ways else None
    _refuse_idle(way)
    return way


def ask_mt_bench(
    source: ModelOptions,
    against: ModelOptions | None,
    bench: MtBenchOptions,
    options: EvalOptions,
    *,
    data: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Let the model, and the one it is compared with, answer and be judged; print the scores."""
    from ..evaluation.multiturn import judge_of, mt_bench

    if folder is None:
        raise click.UsageError(f"{MT_BENCH} keeps its answers in a folder, for the judge and the next run: give -o DIR")
    if against is not None and bench.judge is None:
        raise click.UsageError("--against has no effect without --judge URL; leave it out")
    place = folder
    judge_of(bench)  # may refuse, which is said before the other model answers

    def answered(model: ModelOptions, bar: _Stages, told: MtBenchOptions, other: str | None = None) -> dict[str, Any]:
        return mt_bench(
            *_loaded(model, _QUESTION_TOKENS, told.turn_tokens, options.force),
            place,
            name=_label(model),
            data=data,
            against=other,
            limit=options.limit,
            system=options.system,
            force=options.force,
            progress=bar.update,
            notify=note,
            **asdict(told),
        )

    with _Stages(f"answering {source.model}") as bar:
        other = None
        if against is not None and against.model.endswith(".jsonl"):  # FastChat's file of its answers
            other = against.model
        elif against is not None:
            other = _label(against)
            if other == _label(source):
                raise click.UsageError(f"--against {against.model} is the model itself; name another")
            alone = MtBenchOptions(num_choices=bench.num_choices, turn_tokens=bench.turn_tokens)
            answered(against, bar, alone)
        results = answered(source, bar, bench, other)
    if as_json:
        show_json(results)
    else:
        _show_scores(results)
    _note_mt_bench(results)
    say(str(folder / f"mt_bench-{results['model']}.json"))


def ask_ruler(
    source: ModelOptions,
    names: Sequence[str],
    curve: RulerOptions,
    options: EvalOptions,
    *,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Read the texts under each rule with each cache; print the curve."""
    from ..evaluation.retrieval import ruler

    longest = max(int(length) for length in curve.lengths)
    bits: Any = None if None in curve.caches else max(curve.caches, key=sum)  # the plan is of the largest
    model, tokenizer = _loaded(source, max(longest - _FOUND_TOKENS, 1), _FOUND_TOKENS, options.force, bits)
    with QuestionProgress("reading", "texts") as bar:
        results = ruler(
            model,
            tokenizer,
            names,
            output=folder,
            limit=options.limit,
            seed=options.seed,
            force=options.force,
            progress=bar.update,
            **asdict(curve),
        )
    if as_json:
        show_json(results)
        return
    rows = [("rule", "cache", "tokens", "retrieved", "95 %", "cost", "95 %")]
    for row in results["curve"]:
        cost = row.get("cost")
        cache = "not quantized" if row["cache"] == "0" else f"{row['cache']} bits"
        cells = ("", "") if cost is None else (f"{100 * cost['value']:.1f} %", _between(cost, 100))
        rows.append(
            (row["rule"], cache, f"{row['length']:,}", f"{100 * row['value']:.1f} %", _between(row, 100), *cells)
        )
    print_table(rows, right={2, 3, 4, 5, 6})
    note("the tasks are like RULER's, with texts of our own: compare these figures with each other alone")
    if folder is not None:
        say(str(folder / "ruler.json"))


class _Stages(LeftProgress):
    """Which stage MT-bench is in, and how far that is."""

    def update(self, stage: str, done: int, total: int) -> None:
        self.count(stage, "turns" if stage == "answering" else "judgments", done, total)


def _loaded(
    source: ModelOptions, prompt: int, answer: int, force: bool, kv_bits: Any = None
) -> tuple[Model, Tokenizer]:
    place = source.find()
    tokenizer = source.load_tokenizer(place)
    return source.load_model(place, prompt, Request(max_tokens=answer, kv_bits=kv_bits, force=force)), tokenizer


def _label(source: ModelOptions) -> str:
    """What the files call a model: all that it was made of, as it was typed."""
    from ..evaluation.multiturn import file_name

    parts = [source.model, *([source.revision] if source.revision else []), *source.adapter]
    parts += [source.longrope] if source.longrope != "auto" else []
    return file_name("+".join(parts))


def _show_scores(results: Mapping[str, Any]) -> None:
    if "score" not in results:
        answers = results["answers"]
        show(f"{answers['turns']:,} turns answered, {answers['cut']:,} cut; --judge URL --judge-model NAME rates them")
        return
    against = results.get("against")
    models = [results, *([against] if against else [])]
    heads = [head for told in models for head in (told["model"], "95 %")]
    lines: list[tuple[str, ...]] = [("", *heads, "judgments")]
    rows = [_figures(told["score"]) for told in models]
    for title, figure in rows[0].items():
        cells = [cell for row in rows for cell in _score_cells(row[title])]
        lines.append((title, *cells, f"{figure['judgments']:,}"))
    print_table(lines, right={*range(1, len(lines[0]))})
    if against is not None:
        pairs, difference = against["pairs"], against["difference"]
        rate = pairs["adjusted_win_rate"]
        show()
        if difference["value"] is not None:
            show(f"rated higher than {against['model']} by {difference['value']:.2f}{_bracketed(difference)}")
        if rate["value"] is not None:
            show(
                f"pairs: {pairs['win']} won, {pairs['tie']} tied, {pairs['loss']} lost; adjusted win rate "
                f"{100 * rate['value']:.1f} %{_bracketed(rate, 100)}"
            )


def _figures(score: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of a score by what they are of."""
    turns = {f"turn {turn}": figure for turn, figure in score["turns"].items()}
    return {"all": score["all"], **turns, **score["categories"]}


def _score_cells(figure: Mapping[str, Any]) -> tuple[str, str]:
    return "" if figure["value"] is None else f"{figure['value']:.2f}", _between(figure)


def _note_mt_bench(results: Mapping[str, Any]) -> None:
    """What the figures do not have."""
    if results["without_reference"]:
        note(f"{results['without_reference']:,} questions of math, reasoning or coding have no reference answer")
    if "score" not in results:
        return
    if results["judge"]["prompts"] == "phi3-mlx":
        note("the judge was asked in our own words (no judge_prompts.jsonl): do not compare with published scores")
    if results["score"]["dropped"]:
        note(f"{results['score']['dropped']:,} judgments have no rating, and count nowhere")
    if results["failed"]:
        note(f"{len(results['failed']):,} judgments were not given ({results['failed'][0]}); run again to ask for them")


def _between(figure: Mapping[str, Any], times: float = 1.0) -> str:
    if figure["low"] is None:
        return ""
    digits = 1 if times == 100 else 2
    return f"{times * figure['low']:.{digits}f} to {times * figure['high']:.{digits}f}"


def _bracketed(figure: Mapping[str, Any], times: float = 1.0) -> str:
    """The interval behind its figure, if it has one."""
    return f" ({between})" if (between := _between(figure, times)) else ""


def _refuse_idle(way: str | None) -> None:
    """UsageError for an option that was typed and means nothing to such tasks."""
    bench, curve = ({field.name for field in fields(kind)} for kind in (MtBenchOptions, RulerOptions))
    harness = {field.name for field in fields(EvalOptions)} | {"include_path"}
    idle: dict[str | None, Collection[str]] = {
        None: bench | curve,
        MT_BENCH: curve | harness - {"limit", "system", "force"},
        RULER: bench | harness - {"limit", "seed", "force"} | {"data", "against", "against_adapter"},
    }
    context = click.get_current_context()
    for param in context.command.params:
        typed = context.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if typed and param.name in idle[way]:
            option = max(param.opts, key=len)
            owner = next((name for name, group in ((MT_BENCH, bench), (RULER, curve)) if param.name in group), None)
            why = f"is for --tasks {owner} alone" if owner else f"means nothing to --tasks {way}"
            raise click.UsageError(f"{option} {why}; leave it out")
