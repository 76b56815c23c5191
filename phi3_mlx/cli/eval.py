"""phi3-mlx eval"""

from __future__ import annotations

from dataclasses import asdict, replace

import click

from ..evaluation.options import EvalOptions, MtBenchOptions, RulerOptions
from ..paths import expanded
from .benches import MT_BENCH, ask_mt_bench, ask_ruler, asked_apart
from .declare import options_of
from .measuring import evaluated, task_names, tell
from .options import ModelOptions, model_options, within_memory
from .terminal import note, say


@click.command()
@model_options
@click.option(
    "--tasks",
    required=True,
    metavar="NAME,FILE,...",
    help="lm-eval's tasks, .jsonl files of your questions, .txt files of text for perplexity.",
)
@click.option("--data", metavar="DIR", help="Take the questions of MMLU, ARC, GSM8K, MT-bench and others from here.")
@click.option("--include-path", metavar="DIR", help="Know the tasks that lm-eval's YAML files in here define, too.")
@click.option(
    "--against",
    metavar="NAME",
    help="Ask this model the same, and say what differs: the one before quantizing or tuning.",
)
@click.option("--against-adapter", multiple=True, metavar="DIR[=WEIGHT]", help="As --adapter, for --against.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Keep each answer here, then results.json, samples.jsonl, report.md. Run again, it goes on where it ended.",
)
@options_of("options", EvalOptions, before={"force": [within_memory]})
@options_of("bench", MtBenchOptions)
@options_of("curve", RulerOptions)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: lm-eval's results, without the samples.")
def eval(
    source: ModelOptions,
    tasks: str,
    data: str | None,
    include_path: str | None,
    against: str | None,
    against_adapter: tuple[str, ...],
    output: str | None,
    options: EvalOptions,
    bench: MtBenchOptions,
    curve: RulerOptions,
    as_json: bool,
) -> None:
    """Ask a model the tasks of lm-eval, or your own questions, and say how many it got right.

    Needs the extra eval. Prompts, examples and metrics are those of lm-eval. Without --data it downloads the questions.
    A line of your own file is {"question": ..., "choices": [...], "answer": ...}, or the same without choices; with
    {"text": ...} it is a text whose perplexity is measured. Two more are asked apart: mt_bench, whose answers a judge
    rates, and ruler (or some of its tasks), which finds things in long texts.

    \b
    phi3-mlx eval --tasks questions.jsonl --chat
    phi3-mlx eval -m phi-3.5-mini-4bit --tasks gsm8k --limit 100 --chat
    phi3-mlx eval -m ./4bit --against phi-3.5-mini --tasks mmlu --data eval -o out
    phi3-mlx eval --tasks ruler --lengths 1k,2k --caches 0,4 --limit 5 -o curve
    phi3-mlx eval --tasks mt_bench --data DIR -o out --judge URL --judge-model M
    """
    if against_adapter and against is None:
        raise click.UsageError("--against-adapter needs --against, the model that it is for")
    names = task_names(tasks)
    folder = None if output is None else expanded(output)
    if way := asked_apart(names):
        if way == MT_BENCH:
            other = None if against is None else replace(source, model=against, revision=None, adapter=against_adapter)
            ask_mt_bench(source, other, bench, options, data=data, folder=folder, as_json=as_json)
        else:
            ask_ruler(source, names, curve, options, folder=folder, as_json=as_json)
        return
    from ..evaluation.journal import AGAINST, check_output

    if folder is not None:
        check_output(folder)
    asked = {
        "tasks": names,
        "data": data,
        "include_path": include_path,
        **asdict(options),
    }
    before = None
    if against is not None:
        source.find()  # what is not there is said before the other model is asked, which may take hours
        other = replace(source, model=against, revision=None, adapter=against_adapter)
        before = evaluated(other, asked, None if folder is None else folder / AGAINST)
    results = evaluated(source, asked, folder, against=before)
    tell(results, before, as_json=as_json)
    if folder is not None:
        from ..evaluation.report import INSTALL_PICTURES, REPORT_FILE

        if not any(folder.glob("*.png")):
            note(INSTALL_PICTURES)
        say(f"{folder / REPORT_FILE}")
