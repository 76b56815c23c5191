"""Better data, not more weights: small models that read as many tokens of raw, filtered and synthetic text.

    python -m bench betterdata --corpus DIR --work DIR --blimp FILE [--tokens N] [--hours N]

`bench/betterdata/README.md` is the plan: hypotheses, arms, measures and statistics. Each step leaves its result in the
work folder, so the command goes on where it was ended.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import record
from .plan import FULL, PRIMARY, SMOKE, Plan


def measured(corpus: Path, work: Path, blimp: Path | None, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All steps: the result's rows and its other facts."""
    from . import experiment as steps

    experiment = steps.Experiment(corpus, work, blimp, plan)
    done = experiment.runs()
    rows = steps.rows(done, plan)
    for row in rows:
        if "verdict" in row:
            low, high = row["by_seeds"]
            what = f"{row['measure']}: {row['hypothesis']}, {row['arm']} - {row['against']}"
            click.echo(f"{what}: {row['difference']:+.4f} ({low:+.4f} to {high:+.4f}), {row['verdict']}")
    first = {arm: run for (arm, seed), run in done.items() if seed == plan.seeds[0]}
    facts = {
        "tokens": plan.tokens,
        "seeds": list(plan.seeds),
        "primary": PRIMARY,
        "learning_rate": experiment.rate(),
        "texts": experiment.removed,
        "filter": {key: value for key, value in experiment.facts.items() if key not in ("filtered", "shuffled")},
        "pools": {arm: {key: run[key] for key in ("passages", "tokens_in_pool", "characters")}
                  for arm, run in first.items()},
        "runs": len(done),
        "cpu_hours": round(experiment.spent() / 3600, 2),
    }  # fmt: skip
    return rows, facts


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the texts are.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="The folder of steps and runs.")
@click.option("--blimp", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="BLiMP in one file.")
@click.option("--tokens", default=FULL.tokens, show_default=True, help="That a run reads.")
@click.option("--hours", default=FULL.hours, show_default=True, help="Of the processor, for all runs.")
@click.option("--smoke", is_flag=True, help="Everything at its smallest, on texts that a program makes.")
def main(corpus: Path | None, work: Path | None, blimp: Path | None, tokens: int, hours: float, smoke: bool) -> None:
    if smoke:
        from .smoke import write_corpus

        with tempfile.TemporaryDirectory() as folder:
            made = write_corpus(Path(folder, "corpus"))
            measured(made, Path(folder, "work"), made / "blimp.jsonl", SMOKE)
            click.echo("this was a trial: nothing is recorded")
    elif corpus is None or work is None:
        click.echo("nothing was measured: name the texts with --corpus, and a folder for the runs with --work")
    else:
        rows, facts = measured(corpus, work, blimp, replace(FULL, tokens=tokens, hours=hours))
        record.write("betterdata", rows, "mlx", "scikit-learn", "tokenizers", **facts)


if __name__ == "__main__":
    main()
