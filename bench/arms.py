"""The tables of the experiment with better data, in Markdown; as in `tables`, nothing is measured here."""

from __future__ import annotations

from typing import Any

from .published import main_system, sources

_SHARES = ("answers", "BLiMP")  # measures that are shares, shown in per cent
# What each hypothesis says, as a sentence about its two arms.
_SAID = {
    "H1": "filtered text teaches more than the raw pool",
    "H2": "synthetic stories beside filtered text teach more still",
    "H3": "the choice does it, and not the smaller pool",
    "H4": "a filter of shuffled labels does what a blind draw does",
    "C": "noise harms, so the measure notices bad text",
}
_VERDICTS = {
    "held": "held",
    "contradicted": "is contradicted",
    "undecided": "is undecided",
    "negligible": "is undecided, the difference negligible",
}


_NOTHING = "Not measured yet: nothing is told before an arm has all its seeds (`python -m bench betterdata`)."


def betterdata_arms() -> str:
    """What the models of each arm reached: the mean of the seeds."""
    if (result := main_system().get("betterdata")) is None:
        return _NOTHING
    figures = {(row["arm"], row["measure"]): row["mean"] for row in result["rows"] if "hypothesis" not in row}
    arms, names = (list(dict.fromkeys(key[n] for key in figures)) for n in (0, 1))
    lines = [
        "| arm | tokens in the pool | read | " + " | ".join(names) + " |",
        "|---" + "|--:" * (2 + len(names)) + "|",
    ]
    for arm in arms:
        pool = result["pools"][arm]["tokens_in_pool"]
        cells = [f"{pool:,}", f"{result['tokens'] / pool:.1f}×", *(_figure(figures[arm, name], name) for name in names)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    rates, rater = result["learning_rate"], result["filter"]
    facts = (
        f"Means of the seeds {', '.join(map(str, result['seeds']))}; a run reads {result['tokens']:,} tokens. "
        f"Learning rate {rates['rate']:g}, chosen on the raw arm by the loss on its kept passages ("
        + ", ".join(f"{rate}: {loss:.3f}" for rate, loss in rates["losses"].items())
        + f"). The rater's AUC was {rater['rater_auc']:.2f} on {rater['rated']} passages, so the labels are "
        f"{rater['labels']}; the filter's is {rater['filter_auc']:.2f} on {rater['tested_on']} passages of articles "
        f"that it had not seen. {result['runs']} runs, {result['cpu_hours']:.1f} hours of a processor's core."
    )
    return "\n".join([*lines, "", facts, "", sources([result])])


def betterdata_contrasts() -> str:
    """What the plan's contrasts say, with both intervals."""
    if (result := main_system().get("betterdata")) is None:
        return _NOTHING
    lines = ["| | contrast | measure | difference | over seeds | over texts | |", "|---|---|---|--:|---|---|---|"]
    rows = [row for row in result["rows"] if "hypothesis" in row]
    for name in dict.fromkeys(row["hypothesis"] for row in rows):
        for row in (row for row in rows if row["hypothesis"] == name):
            cells = [
                name,
                f"{row['arm']} − {row['against']}",
                row["measure"],
                _difference(row["difference"], row["measure"]),
                *(
                    " to ".join(_difference(end, row["measure"]) for end in row[key])
                    for key in ("by_seeds", "by_texts")
                ),
                row["verdict"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def betterdata_said() -> str:
    """What became of each hypothesis, by the primary measure; those whose arms lack a seed are named."""
    if (result := main_system().get("betterdata")) is None:
        return _NOTHING
    lines = []
    for row in (row for row in result["rows"] if "hypothesis" in row and row["measure"] == result["primary"]):
        ends = (" to ".join(_difference(end, row["measure"]) for end in row[key]) for key in ("by_seeds", "by_texts"))
        intervals = "{} over seeds, {} over texts".format(*ends)
        lines.append(
            f"- **{row['hypothesis']} {_VERDICTS[row['verdict']]}**: {_SAID[row['hypothesis']]}. {row['arm']} − "
            f"{row['against']}: {_difference(row['difference'], row['measure'])} bits per character ({intervals})."
        )
    told = {row["hypothesis"] for row in result["rows"] if "hypothesis" in row}
    if missing := [name for name in _SAID if name not in told]:
        lines.append(f"- Not measured, because the budget ended before their arms had all seeds: {', '.join(missing)}.")
    return "\n".join(lines)


def betterdata_pools() -> str:
    """Where the characters of each pool of the first seed come from, in per cent."""
    if (result := main_system().get("betterdata")) is None:
        return _NOTHING
    pools: dict[str, Any] = result["pools"]
    names = list(dict.fromkeys(source for pool in pools.values() for source in pool["characters"]))
    lines = ["| arm | " + " | ".join(names) + " |", "|---" + "|--:" * len(names) + "|"]
    for arm, pool in pools.items():
        characters = pool["characters"]
        cells = (f"{characters.get(name, 0) / sum(characters.values()):.0%}" for name in names)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float, measure: str) -> str:
    return f"{value:.1%}" if measure in _SHARES else f"{value:.3f}"


def _difference(value: float, measure: str) -> str:
    return f"{100 * value:+.1f}" if measure in _SHARES else f"{value:+.3f}"
