"""The tables of results, in Markdown: what was measured, and the machine, versions and commands under it."""

from __future__ import annotations

from typing import Any

from . import agreement
from .published import main_system, named, read, read_all, scaled, shown, sources, systems


def parity() -> str:
    """Logits and greedy tokens against transformers."""
    result = read("parity")
    table = ["| " + " | ".join(agreement.HEAD) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    table += ["| " + " | ".join(line) + " |" for line in agreement.lines(result["rows"])]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    source = f"`{result['command']}`, {result['date']}, {result['machine']}; {packages}."
    return "\n".join([*table, "", source])


COMPARED = ["| measured | phi3-mlx | mlx-lm | ratio |", "|---|---|---|---|"]


def _streams(results: dict[str, dict[str, Any]], *, peaks: bool = False) -> tuple[list[str], list[dict[str, Any]]]:
    """Rows for prefill and decode beside mlx-lm, each left out until it was run, and the results that they are from."""
    table, used = [], []
    for bench in ("prefill", "decode"):
        for result in named(bench, results):
            used.append(result)
            for case in dict.fromkeys(row["case"] for row in result["rows"]):
                rows = {row["package"]: row for row in result["rows"] if row["case"] == case}
                ours, theirs = rows["phi3-mlx"], rows["mlx-lm"]
                what = f"{bench}, {ours['model']}"
                table.append(
                    f"| {what} | {shown(ours['tokens_per_second'], 'tok/s')} | "
                    f"{shown(theirs['tokens_per_second'], 'tok/s')} | {ours['ratio']:.2f}× |"
                )
                if peaks:
                    least, most = (scaled(row["peak_memory"], 1e6) for row in (ours, theirs))
                    ratio = least["median"] / most["median"]
                    table.append(
                        f"| {what}, peak without weights | {shown(least, 'MB')} | {shown(most, 'MB')} | {ratio:.2f}× |"
                    )
    return table, used


def gpu() -> str:
    """What was measured on GPUs, a table a system."""
    parts: list[str] = []
    for results in [results for results in systems().values() if results is not main_system()]:
        rows, used = _streams(results, peaks=True)
        for result in named("longcontext", results):
            used.append(result)
            sides = {row["package"]: row for row in result["rows"] if row["tokens"] == result["rows"][-1]["tokens"]}
            ours, theirs = sides["phi3-mlx"], sides.get("mlx-lm")
            full = "Phi-3-mini" if result["full"] else "Phi-3-mini's heads"
            what = (
                f"{ours['tokens']:,} tokens, {result['layers']} layers of {full}, {result['bits']}-bit keys and values"
            )
            mine = f"{ours['peak'] / 1e6:,.0f} MB ({ours['planned'] / 1e6:,.0f} planned)"
            other = " | "
            if theirs:
                part = "" if theirs["read"] == ours["read"] else f" after {theirs['read']:,}"
                other = f"{theirs['peak'] / 1e6:,.0f} MB{part} | {result['ratio']:.2f}×"
            rows.append(f"| {what}, peak without weights | {mine} | {other} |")
            rows.append(f"| reading them | {ours['read'] / ours['seconds']:,.0f} tok/s | | |")
            if "decode" in result:
                other = result.get("decode_mlx_lm", {})
                speed = f"{other['tokens_per_second']:.2f} tok/s" if "tokens_per_second" in other else ""
                failed = "fails" if "error" in other else speed
                rows.append(
                    f"| decoding behind them | {result['decode']['tokens_per_second']:.2f} tok/s | {failed} | |"
                )
        parts += [*COMPARED, *rows, "", f"Medians (least to most); {sources(used)}", ""]
    return "\n".join(parts).strip() or "Nothing was measured on a GPU yet."


def speed() -> str:
    """Start, prefill, decode, conversion and training beside mlx-lm."""
    start = read("coldstart")
    seconds = {row["command"]: row["seconds"] for row in start["rows"]}
    streams, used = _streams(main_system())
    results = [start, *used]
    table = [
        *COMPARED,
        f"| cold start to the first token, bundled model | {shown(seconds['phi3-mlx'], 's')} | "
        f"{shown(seconds['mlx-lm'], 's')} | {start['ratio']:.2f}× |",
        *streams,
    ]
    if (converted := main_system().get("convert")) is not None:
        results.append(converted)
        what = f"conversion of {converted['source_bytes'] / 1e9:.1f} GB to 4 bits"
        table += [
            _row(f"{what}, time", converted, "seconds", "s"),
            _row(f"{what}, peak memory", converted, "peak_bytes", "MB", 1e6),
        ]
    if (tuned := main_system().get("tune")) is not None:
        results.append(tuned)
        what = f"LoRA, {tuned['layers']} of Phi-3-mini's layers"
        table += [
            _row(f"{what}, trained tokens", tuned, "tokens_per_second", "tok/s"),
            _row(f"{what}, peak memory", tuned, "peak_memory", "MB", 1e6),
        ]
    return "\n".join([*table, "", f"Medians (least to most); {sources(results)}"])


def batch() -> str:
    """Several prompts together, one by one, and together in mlx-lm."""
    result = read("batch")
    table = ["| decode | together | one by one | ratio | mlx-lm together |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = {row["package"]: row for row in result["rows"] if row["case"] == case}
        cells = [
            shown(rows[name]["tokens_per_second"], "tok/s") for name in ("phi3-mlx", "phi3-mlx, one by one", "mlx-lm")
        ]
        together = rows["phi3-mlx"]
        what, ratio = f"{together['rows']} prompts, {together['model']}", f"{together['ratio']:.1f}×"
        table.append(f"| {what} | {cells[0]} | {cells[1]} | {ratio} | {cells[2]} |")
    return "\n".join([*table, "", sources([result])])


def traffic() -> str:
    """Requests that arrive one after another, and a long newcomer beside an answer."""
    result = read("traffic")
    packages = ("phi3-mlx", "mlx-lm")
    table = [
        "| model | lengths | phi3-mlx | mlx-lm | ratio | of the processor's time | the last one's first token | peak |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        ours, theirs = (_side(result["rows"], case, package) for package in packages)
        speeds = [shown(side["tokens_per_second"], "tok/s") for side in (ours, theirs)]
        ratios = [
            f"{ours[figure]['median'] / theirs[figure]['median']:.2f}×"
            for figure in ("tokens_per_second", "tokens_per_processor_second")
        ]
        first = " and ".join(f"{side['last_first_token']['median']:.2f} s" for side in (ours, theirs))
        peak = " and ".join(f"{side['peak_memory']['median'] / 1e6:,.0f} MB" for side in (ours, theirs))
        lengths = "whole" if ours["shorter"] == 1 else f"1/{ours['shorter']}"
        table.append(f"| {ours['model']} | {lengths} | {' | '.join([*speeds, *ratios])} | {first} | {peak} |")
    lines = [*table, "", f"{result['requests']} requests; the last two columns are phi3-mlx and mlx-lm."]
    newcomers = read("newcomer")
    lines += [
        "",
        f"| a newcomer of {newcomers['rows'][0]['tokens']:,} tokens | its first token alone | beside an answer | ratio "
        "| that answer waits | longest step with a chunk | step without |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in newcomers["rows"]:
        seconds = [f"{row[figure]['median']:.3g} s" for figure in ("alone", "beside", "gap", "chunk", "step")]
        seconds.insert(2, f"{row['late']['median']:.2f}×")
        lines.append(f"| {row['package']} | {' | '.join(seconds)} |")
    return "\n".join([*lines, "", f"Medians (least to most); {sources([result, newcomers])}"])


def serve() -> str:
    """The server beside mlx-lm's."""
    result = read("serve")
    table = [
        "| weights | clients | answer | requests a second, phi3-mlx | mlx-lm | ratio | first token, phi3-mlx | mlx-lm "
        "| ratio | peak |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    rows = [{"answer": result.get("answer"), "shared": result.get("shared"), **row} for row in result["rows"]]
    for model, clients, answer in dict.fromkeys((row["model"], row["clients"], row["answer"]) for row in rows):
        alike = [row for row in rows if (row["model"], row["clients"], row["answer"]) == (model, clients, answer)]
        sides = {row["package"]: row for row in alike}
        pair = [sides["phi3-mlx"], sides["mlx-lm"]]
        cells = []
        for figure, unit in (("requests_per_second", ""), ("first_token", "s")):
            cells += [shown(side[figure], unit).replace("  ", " ").strip() for side in pair]
            cells.append(f"{pair[0][figure]['median'] / pair[1][figure]['median']:.2f}×")
        peaks = [side["peak_memory"] for side in pair]
        cells.append(" and ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks if peak is not None))
        table.append(f"| {model} | {clients} | {answer} | {' | '.join(cells)} |")
    longest = max(row["shared"] for row in rows)
    shorter = {row["model"]: row["shared"] for row in rows if row["shared"] < longest}
    facts = (
        f"Every client asks once or more, in all {result['requests']} times at least. The system message has "
        f"{longest:,} tokens{''.join(f', {shared:,} with {model}' for model, shared in shorter.items())}; "
        f"{result['layers']} layers. The peak is the whole process'."
    )
    return "\n".join([*table, "", facts, f"Medians (least to most); {sources([result])}"])


def bad_inputs() -> str:
    """What the two servers do with what a client may get wrong."""
    ours, theirs = (read("serve")["bad"][package] for package in ("phi3-mlx", "mlx-lm"))
    table = ["| sent | phi3-mlx | mlx-lm |", "|---|---|---|"]
    for one, other in zip(ours, theirs, strict=True):
        table.append(f"| {one['input']} | {_reply(one)} | {_reply(other)} |")
    return "\n".join([*table, "", sources([read("serve")])])


def _reply(row: dict[str, Any]) -> str:
    """A status and what was told; of an answer, that there was one."""
    if not row["status"]:
        return f"the connection broke{'' if row['lives'] else ', and so did the server'}"
    told = "answers" if row["status"] == 200 else row["told"].replace("|", "\\|")
    return f"{row['status']}: {told}{'' if row['lives'] else '; the server is dead'}"


def host() -> str:
    """What a step costs the host, beside mlx-lm."""
    result = read("host")
    table = [
        "| weights, rows | host, phi3-mlx | host, mlx-lm | ratio | whole step, phi3-mlx | whole step, mlx-lm | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for weights, rows in dict.fromkeys((row["weights"], row["rows"]) for row in result["rows"]):
        sides = {row["package"]: row for row in result["rows"] if (row["weights"], row["rows"]) == (weights, rows)}
        ours, theirs = sides["phi3-mlx"], sides["mlx-lm"]
        cells = []
        for figure in ("host", "step"):
            cells += [f"{side[figure]['median']:.2f} ms" for side in (ours, theirs)]
            cells.append(f"{ours['ratios'][figure]:.2f}×")
        table.append(f"| {weights}, {rows} | {' | '.join(cells)} |")
    return "\n".join([*table, "", f"{result['layers']} layers of a tiny width; {sources([result])}"])


def _side(rows: list[dict[str, Any]], case: str, package: str) -> dict[str, Any]:
    return next(row for row in rows if (row["case"], row["package"]) == (case, package))


def prefix() -> str:
    """Tokens that are read where prompts begin alike."""
    result = read("prefix")
    table = [
        f"| a text of {result['tokens']:,} tokens | tokens of prompts | read | of the least |",
        "|---|---|---|---|",
    ]
    table += [
        f"| {row['what']} | {row['prompt_tokens']:,} | {row['read_tokens']:,} | {row['ratio']:.2f}× |"
        for row in result["rows"]
    ]
    return "\n".join([*table, "", sources([result])])


def lookup() -> str:
    """Answers with prompt lookup and without."""
    results = read_all("lookup")
    table = [
        "| model: prompts | tokens a step | drafts that held | mlx-lm | plain | with lookup | of plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        where = f", {len(result['texts'])} books" if result["texts"] else ""
        for row in result["rows"]:
            held = "none made" if row["accepted"] is None else f"{row['accepted']:.0%}"
            ways = (shown(row[f"{way}_seconds"], "s") for way in ("mlx_lm", "plain", "lookup"))
            table.append(
                f"| {result['model']}{where}: {row['prompts']} | {row['tokens_per_step']:.2f} | {held} | "
                f"{' | '.join(ways)} | {row['ratio']:.2f}× |"
            )
    return "\n".join([*table, "", sources(results)])


def _row(what: str, result: dict[str, Any], figure: str, unit: str, scale: float = 1.0) -> str:
    rows = {row["package"]: scaled(row[figure], scale) for row in result["rows"]}
    ours, theirs = rows["phi3-mlx"], rows["mlx-lm"]
    ratio = ours["median"] / theirs["median"]
    return f"| {what} | {shown(ours, unit)} | {shown(theirs, unit)} | {ratio:.2f}× |"


def kvquality() -> str:
    """Quality of packed caches, a table a model."""
    lines: list[str] = []
    results = read_all("kvquality")
    for result in results:
        one = result["rows"][0]
        lines += [
            f"{result['model']} (perplexity {one['unpacked_perplexity']:.2f} in floats; *size*: of 16-bit numbers):",
            "",
            "| `--kv-bits` | `--kv-group-size` | size | KL, nats | same choice | perplexity | tokens alike |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["rows"]:
            keys, values = row["keys"], row["values"]
            lines.append(
                f"| {keys if keys == values else f'{keys},{values}'} | {row['group_size']} | {row['size']:.0%} | "
                f"{row['kl']:.5f} | {row['same_choice']:.1%} | {row['perplexity']:.2f} | "
                f"{row['alike']:.0f} of {result['generated']} |"
            )
        lines.append("")
    return "\n".join([*lines, sources(results)])


def longcontext() -> str:
    """Peak memory of long prompts."""
    lines = ["| model | tokens | read | reading | then decoding | planned | mlx-lm, reading | ratio |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|")
    results = read_all("longcontext")
    seen: set[tuple[str, int, int]] = set()
    for result in sorted(results, key=lambda result: result["layers"]):
        name = f"{result['layers']} layers, {result['bits']}-bit keys and values"
        rows = {(row["package"], row["tokens"]): row for row in result["rows"]}
        for (package, tokens), row in rows.items():
            if package != "phi3-mlx" or (name, tokens, row["read"]) in seen:
                continue
            seen.add((name, tokens, row["read"]))
            theirs = rows.get(("mlx-lm", tokens))
            read = "all" if row["read"] == tokens else "first and last chunk"
            decoded = result.get("decode") if tokens == result["rows"][-1]["tokens"] else None
            cells = [
                read,
                f"{row['peak'] / 1e6:,.0f} MB",
                f"{decoded['peak'] / 1e6:,.0f} MB" if decoded else "",
                f"{row['planned'] / 1e6:,.0f} MB",
                *((f"{theirs['peak'] / 1e6:,.0f} MB", f"{row['peak'] / theirs['peak']:.2f}×") if theirs else ("", "")),
            ]
            lines.append(f"| {name} | {tokens:,} | {' | '.join(cells)} |")
    lines += ["", "![Peak memory against the prompt's length](../bench/results/longcontext.png)"]
    return "\n".join([*lines, "", sources(results)])


def document() -> str:
    """A long file under a memory limit."""
    result = read("document")
    ours, theirs = result["rows"]
    limit, bits, minutes = f"{result['limit'] / 1e6:.0f} MB", result["bits"], f"{ours['seconds'] / 60:.0f}"
    peak, planned, exceeded = (f"{size / 1e6:,.0f} MB" for size in (ours["peak"], ours["planned"], theirs["peak"]))
    text = f"""\
A file of {ours["read"]:,} tokens (two layers with 4 of Phi-3-mini's heads, random weights) within {limit}. Without
`--kv-bits` the file is refused:

```text
{result["refusal"]}
```

With `--kv-bits {bits}` it is read and answered in {minutes} minutes on this CPU, with a peak of {peak} ({planned}
planned). mlx-lm has taken {exceeded} after {theirs["read"]:,} tokens, where it was stopped."""
    return f"{text}\n\n{sources([result])}"


def blocksparse() -> str:
    """Attention of Phi-3-small's sparse layers against dense attention."""
    result = read("blocksparse")
    rows = {(row["queries"], row["tokens"], row["attention"]): row for row in result["rows"]}
    lines = [
        "| queries | keys | time | faster than masked | than causal | peak, of masked |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for (queries, tokens, attention), row in rows.items():
        if attention != "sparse":
            continue
        what = "one token" if queries == 1 else f"{queries} tokens"
        cells = []
        for other in ("dense masked", "causal"):
            against = rows.get((queries, tokens, other))
            cells.append(f"{against['times_slower']:.1f}×" if against else "")
        masked = rows.get((queries, tokens, "dense masked"))
        cells.append(f"{masked['sparse_peak_ratio']:.2f}×" if masked else "")
        lines.append(f"| {what} | {tokens:,} | {shown(scaled(row['seconds'], 1e-3), 'ms')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Medians (least to most); {sources([result])}"])


def preferences() -> str:
    """Memory of DPO, and questions answered right before and after it."""
    memory, answers = read("preferences"), read("preference-answers")
    lines = ["| package | peak | beside the weights, of them |", "|---|--:|--:|"]
    for row in memory["rows"]:
        share = (row["peak_memory"] - row["weights"]) / row["weights"]
        lines.append(f"| {row['package']} | {row['peak_memory'] / 1e9:.2f} GB | {share:.2f} |")
    lines += ["", f"| model | right, of {answers['questions']} |", "|---|--:|"]
    lines += [f"| {row['model']} | {row['right']:.1%} ± {1.96 * row['error']:.1%} |" for row in answers["rows"]]
    return "\n".join([*lines, "", sources([memory, answers])])


def finetune() -> str:
    """Questions answered right by every model."""
    result = read("finetune")
    lines = [f"| model | right, of {result['questions']} | of the adapter's effect |", "|---|--:|--:|"]
    for row in result["rows"]:
        survived = "" if row["survived"] is None else f"{row['survived']:.0%}"
        lines.append(f"| {row['model']} | {row['right']:.1%} | {survived} |")
    trained = f"{result['steps']} steps in {result['seconds']:.0f} s, validation loss {result['loss']:.4f}"
    return "\n".join([*lines, "", f"Trained: {trained}.", "", sources([result])])


def pretraining() -> str:
    """Tokens that a small model learns from in a second, here and in PyTorch."""
    result = read("pretrain")
    lines = ["| package | tok/s | tokens a second of the processor |", "|---|--:|--:|"]
    for row in result["rows"]:
        wall, processor = (row[key] for key in ("tokens_per_second", "tokens_per_cpu_second"))
        ends = f"({wall['min']:,.0f} to {wall['max']:,.0f})"
        lines.append(f"| {row['package']} | {wall['median']:,.0f} {ends} | {processor['median']:,.0f} |")
    return "\n".join([*lines, "", sources([result])])
