"""Write the figures of the READMEs and of docs/ from bench/results/ and real runs: nothing in them is typed by hand.

python -m bench readme [--check]
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import click

from . import agreement, arms, bundled, exported, judges, methods, published, spared, tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "tiny" / "README.md"]
STORY = 'phi3-mlx generate -p "Tell me a story about a duck and a frog."'
FACT = 'echo "What is the secret word of the owl?" | phi3-mlx generate -f notebooks/secrets.txt -f -'
MACS = ("phi-3-mini-4k-4bit", "phi-3.5-mini-4bit", "phi-4-mini-4bit", "phi-3-medium-128k-4bit", "phi-4-4bit")


@cache
def run(line: str) -> tuple[str, str]:
    """What a line of shell with one `phi3-mlx` in it writes to stdout and to stderr."""
    before, _, after = line.rpartition("phi3-mlx ")
    command = [sys.executable, "-c", "from phi3_mlx.cli import main; main()", *shlex.split(after)]
    given = shlex.split(before.removesuffix("| "))[1] + "\n" if before else ""
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, input=given)
    return done.stdout.strip(), done.stderr.strip()


def _wrapped(text: str) -> list[str]:
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, 120) or [""]]


def demo() -> str:
    """What the README's first two commands print; of the second how many tokens were read, without the times."""
    answer, stats = run(f"{FACT} --stats")
    (read,) = re.findall(r"^prompt [\d,]+ tokens", stats, re.M)  # a slow machine tells before how far it has read
    return "\n".join(["```text", *_wrapped(run(STORY)[0]), "", answer, f"{read} …", "```"])


def fact() -> str:
    """The answers to one question with the reference's rule and with the short factors pinned."""
    right, short = run(f"{FACT} --stats")[0], run(f"{FACT} --longrope short")[0]
    return "\n".join(["```text", right, short, "```"])


def reasons() -> str:
    """Three reasons for this package, each with the figure behind it."""
    short = _parity("Phi-3.5-mini", "short")
    long, tuned = published.read("longcontext"), published.read("tune")
    peaks = {(row["package"], row["tokens"]): row["peak"] for row in long["rows"]}
    tokens = max(tokens for package, tokens in peaks if package == "mlx-lm")
    ratio = peaks["phi3-mlx", tokens] / peaks["mlx-lm", tokens]
    speed = _median_ratio(tuned, "tokens_per_second")
    return f"""\
- **Right at every length.** In a prompt of {short["tokens"]} tokens for Phi-3.5-mini's shape, the likeliest next token
  is transformers' at {short["phi3-mlx"]["greedy_agreement"]:.0%} of the positions (mlx-lm: \
{short["mlx-lm"]["greedy_agreement"]:.0%}). Measured in float32 with random weights.
- **Long prompts in bounded memory.** {tokens:,} tokens with 4-bit keys and values take {ratio:.0%} of mlx-lm's memory
  beside the weights. Measured on a CPU, with {long["layers"]} layers of Phi-3-mini's heads. Each run is planned
  first, and refused if it would not fit.
- **Fine-tuning that survives.** A killed run resumes to exactly the same weights. LoRA runs at {speed:.1f}×
  mlx-lm's speed. Measured on a CPU, with one of Phi-3-mini's layers."""


def macs() -> str:
    """Models by name: the download, and the longest context on Macs of three sizes."""
    from phi3_mlx.engine.machine import mac_working_set
    from phi3_mlx.engine.plan import Workload
    from phi3_mlx.sizes import size_text
    from phi3_mlx.store.hub import find_alias

    lines = [
        "| name | download | context | longest on 8 GB | 16 GB | 32 GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in MACS:
        alias = find_alias(name)
        assert alias is not None
        fits = (
            Workload.of_release(alias.shape, alias.bytes).longest(mac_working_set(gb * 2**30)) for gb in (8, 16, 32)
        )
        cells = [
            size_text(alias.bytes),
            f"{alias.shape.max_position_embeddings:,}",
            *(f"{length:,}" if length else "–" for length in fits),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def right() -> str:
    """Four cases of the comparison with transformers."""
    lines = ["| model | case | phi3-mlx | mlx-lm |", "|---|---|--:|--:|"]
    for model, case, what in (
        ("Phi-3.5-mini", "short", "a prompt of 64 tokens"),
        ("Phi-3.5-mini", "boundary", "a prompt of 4,096 tokens, the boundary"),
        ("Phi-3.5-mini", "generation crossing", "an answer that crosses the boundary"),
        ("Phi-3-mini-4k", "window crossed", "a prompt of 3,000 tokens, past the window of 2,047"),
    ):
        row = _parity(model, case)
        ours, theirs = (agreement.cells(row, package)[1] for package in ("phi3-mlx", "mlx-lm"))
        lines.append(f"| {model} | {what} | {ours} | {theirs} |")
    return "\n".join(lines)


def fast() -> str:
    """Four figures beside mlx-lm: two of a CPU, two of a GPU."""
    start, tuned = published.read("coldstart"), published.read("tune")
    seconds = {row["command"]: row["seconds"]["median"] for row in start["rows"]}
    learnt = {row["package"]: row["tokens_per_second"]["median"] for row in tuned["rows"]}
    lines = ["| measured | on | phi3-mlx | mlx-lm |", "|---|---|--:|--:|"]
    lines.append(
        f"| start to first token, bundled model | CPU | {seconds['phi3-mlx']:.2f} s | {seconds['mlx-lm']:.2f} s |"
    )
    lines.append(
        f"| LoRA on one of Phi-3-mini's layers | CPU | {learnt['phi3-mlx']:.0f} tok/s | {learnt['mlx-lm']:.0f} tok/s |"
    )
    (system,) = [results for results in published.systems().values() if "longcontext-128k-full" in results]
    for bench, what in (("prefill", "reading a prompt"), ("decode", "answering")):
        result = system[bench]
        rows = {row["package"]: row for row in result["rows"] if row["case"] == result["rows"][0]["case"]}
        assert "Phi-3-mini" in rows["phi3-mlx"]["model"]
        ours, theirs = (f"{rows[name]['tokens_per_second']['median']:,.0f} tok/s" for name in ("phi3-mlx", "mlx-lm"))
        lines.append(
            f"| {what}, Phi-3-mini's shape in 4 bits | {result['machine'].split(',')[0]} | {ours} | {theirs} |"
        )
    return "\n".join(lines)


def plan() -> str:
    """What `phi3-mlx plan` prints of the model that most people take."""
    return "\n".join(["```text", run("phi3-mlx plan -m phi-3.5-mini-4bit")[0], "```"])


def family() -> str:
    """The table of `phi3-mlx models`."""
    from phi3_mlx.engine.capacity import family_rows

    rows = family_rows()
    lines = [
        "| model | parameters | layers | heads | context | MMLU | MT-bench | 4-bit | "
        + " | ".join(f"longest on {gb} GB" for gb in rows[0].longest)
        + " |",
        "|---" + "|--:" * (7 + len(rows[0].longest)) + "|",
    ]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join(lines)


def june() -> str:
    from phi3_mlx.store.family import june_text

    return june_text()


def report() -> str:
    """The summary of the bundled model's own report."""
    text = (ROOT / "weights" / "tiny" / "REPORT.md").read_text(encoding="utf-8")
    return text.split("\n\n", 1)[1].split("\n\n![")[0].strip()


def _parity(model: str, case: str) -> dict[str, Any]:
    (row,) = [row for row in published.read("parity")["rows"] if (row["model"], row["case"]) == (model, case)]
    return row


def _median_ratio(result: dict[str, Any], figure: str) -> float:
    ours, theirs = (
        {row["package"]: row[figure]["median"] for row in result["rows"]}[p] for p in ("phi3-mlx", "mlx-lm")
    )
    return ours / theirs


BLOCKS = {
    "reasons": reasons,
    "demo": demo,
    "macs": macs,
    "right": right,
    "fast": fast,
    "fact": fact,
    "plan": plan,
    "family": family,
    "june": june,
    "report": report,
    **{
        table.__name__: table
        for table in (
            methods.quantization,
            methods.methods,
            methods.formats,
            methods.flipped,
            tables.finetune,
            tables.pretraining,
            tables.preferences,
            tables.parity,
            tables.speed,
            tables.batch,
            tables.traffic,
            tables.serve,
            tables.bad_inputs,
            tables.prefix,
            tables.host,
            tables.lookup,
            spared.evaluating,
            spared.schema,
            spared.draft,
            tables.gpu,
            tables.kvquality,
            tables.longcontext,
            tables.document,
            tables.blocksparse,
            judges.judges,
            exported.exported_types,
            exported.exported_longrope,
            exported.exported_experts,
            arms.betterdata_arms,
            arms.betterdata_said,
            arms.betterdata_contrasts,
            arms.betterdata_pools,
            bundled.bundled_figures,
            bundled.bundled_samples,
        )
    },
}


def filled(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between each pair of markers replaced."""
    for name, body in blocks.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise click.ClickException(f"a page must have {opening.strip()} and {closing} once each")
        before, rest = text.split(opening)
        text = f"{before}{opening}{body}\n{closing}{rest.split(closing)[1]}"
    return text


def shown_in(text: str) -> list[str]:
    """The blocks that a text has markers of."""
    return [name for name in BLOCKS if f"<!-- {name} -->" in text]


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say whether they are up to date.")
def main(check: bool) -> None:
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text, {name: BLOCKS[name]() for name in shown_in(text)})
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        raise click.ClickException(f"{', '.join(stale)}: out of date; run python -m bench readme")


if __name__ == "__main__":
    main()
