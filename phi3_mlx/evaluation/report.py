"""What an evaluation leaves in its directory: results.json in lm-eval's layout, samples.jsonl, report.md, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..store.atomic import new_files
from .figures import Figure, figures_of
from .paired import PairedFigure, p_text
from .pictures import draw_pictures
from .samples import right_metric, told

RESULTS_FILE, SAMPLES_FILE, REPORT_FILE = "results.json", "samples.jsonl", "report.md"
INSTALL_PICTURES = 'no pictures, because matplotlib is not installed: pip install "phi3-mlx[plot]"'
_LISTED = 20  # flips of a task each way; all are in samples.jsonl
_QUESTION_CHARACTERS = 160  # characters of a question
FIGURE_COLUMNS = ("task", "metric", "answer by", "shots", "questions", "value", "95 %")
PAIR_COLUMNS = ("task", "metric", "before", "after", "difference", "95 %", "lost", "won", "p", "KL")


def write_results(results: Mapping[str, Any], directory: Path, *, before: Mapping[str, Any] | None = None) -> None:
    """`results.json`, `samples.jsonl`, `report.md` and its pictures, each in one step; `before`: of the other model.

    A line of samples is a question and a way to read its answer. It has lm-eval's keys (doc, arguments, resps,
    prompt_hash, the metrics), its `task`, and in plain words `question`, `choices` with log-probabilities, `answer` and
    `right`; with another model also `before` (its answer and metrics) and `flip` ("lost" or "won", by metric).

    Raises DataError where nothing can be written.
    """
    from lm_eval.utils import handle_non_serializable

    def write(value: Any, indent: int | None = None) -> str:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=handle_non_serializable)
        return text.encode("utf-8", "backslashreplace").decode()

    facts = {key: value for key, value in results.items() if key not in ("samples", "against")}
    if "against" in results:
        facts["against"] = [asdict(pair) for pair in results["against"]]
    try:
        with new_files(directory, last=RESULTS_FILE) as folder:
            (folder / RESULTS_FILE).write_text(write(facts, indent=2) + "\n", encoding="utf-8")
            with open(folder / SAMPLES_FILE, "w", encoding="utf-8") as file:
                file.writelines(write(line) + "\n" for line in sample_lines(results, before))
            pictures = draw_pictures(results, folder)
            (folder / REPORT_FILE).write_text(evaluation_markdown(results, pictures, before), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{error.filename or directory} cannot be written: {error.strerror or error}; make room for it, and run "
            "the same again"
        ) from error


def sample_lines(results: Mapping[str, Any], before: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The lines of samples.jsonl."""
    flips: dict[tuple[str, int, str], dict[str, str]] = {}
    for pair in results.get("against", ()):
        for way, places in (("lost", pair.lost), ("won", pair.won)):
            for task, doc_id in places or ():
                flips.setdefault((task, doc_id, pair.filtered), {})[pair.metric] = way
    for task, samples in results["samples"].items():
        others = [None] * len(samples) if before is None else before["samples"][task]
        for sample, other in zip(samples, others, strict=True):
            line = {"task": task, **told(sample), **sample}
            if other is not None:
                metrics = {name: other[name] for name in other["metrics"]}
                line["before"] = {"answer": told(other).get("answer"), **metrics}
                if flip := flips.get((task, sample["doc_id"], sample["filter"])):
                    line["flip"] = flip
            yield line


def number_text(value: float, sign: str = "") -> str:
    """A figure to four places, or to one where it is large, as perplexities are."""
    return f"{value:{sign},.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def figure_row(figure: Figure) -> tuple[str, ...]:
    """A figure's cells, for FIGURE_COLUMNS."""
    shots = "" if figure.shots is None else str(figure.shots)
    interval = "" if figure.interval is None else f"± {number_text(figure.interval)}"
    answer = "" if figure.filtered == "none" else figure.filtered
    return figure.task, figure.metric, answer, shots, f"{figure.questions:,}", number_text(figure.value), interval


def pair_row(pair: PairedFigure) -> tuple[str, ...]:
    """A comparison's cells, for PAIR_COLUMNS; the filter stands behind the metric."""
    metric = pair.metric if pair.filtered == "none" else f"{pair.metric}, {pair.filtered}"
    interval = "" if pair.interval is None else " to ".join(number_text(end, "+") for end in pair.interval)
    lost, won = ("" if places is None else f"{len(places):,}" for places in (pair.lost, pair.won))
    chance = "" if pair.chance is None else p_text(pair.chance)
    kl = "" if pair.kl is None else f"{pair.kl:.4f}"
    figures = number_text(pair.before), number_text(pair.after), number_text(pair.difference, "+")
    return pair.task, metric, *figures, interval, lost, won, chance, kl


def verdicts(pairs: Sequence[PairedFigure]) -> list[str]:
    """What can be said of each comparison, in a line."""
    return [f"{', '.join(part for part in pair_row(pair)[:2])}: {pair.verdict()}" for pair in pairs]


def cuts(counts: Mapping[str, Any]) -> list[str]:
    """What was cut, in sentences."""
    said = {
        "cut_prompts": ("prompt was", "prompts were", "longer than the context (max_length), and cut at the beginning"),
        "cut_answers": ("answer was", "answers were", "cut by the budget (max_gen_toks)"),
    }
    return [
        f"{counts[key]:,} {singular if counts[key] == 1 else plural} {what}"
        for key, (singular, plural, what) in said.items()
        if counts.get(key)
    ]


def evaluation_markdown(
    results: Mapping[str, Any], pictures: Mapping[str, str], before: Mapping[str, Any] | None = None
) -> str:
    """report.md. `pictures`: file names by what they show."""
    config = results["config"]
    lines = [f"# {_code(str(config['model']))}: what it got right", ""]
    lines += [f"| {name} | {_code(value)} |" for name, value in _settings(results)]
    lines.insert(2, "| what was asked | |\n|---|---|")
    lines += ["", *_table(FIGURE_COLUMNS, map(figure_row, figures_of(results)), 3), ""]
    lines += ["The last column is 95 % of the interval of confidence: 1.96 standard errors each way.", ""]
    lines += [f"{sentence}.\n" for sentence in cuts(results["phi3_mlx"])]
    if not pictures:
        lines += [f"{INSTALL_PICTURES}.\n"]
    lines += _picture(pictures, "figures", "The share of right answers by task, with 95 % intervals")
    if before is not None:
        lines += _compared(results, before, pictures)
    if "calibration" in pictures:
        lines += ["## How sure the model was", ""]
        lines += _picture(pictures, "calibration", "The share of right answers by the model's confidence")
        lines += [
            "A question's confidence is the share that the likeliest choice has of the probability of all. On the "
            "diagonal the model is right as often as it is sure.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def summary_markdown(results: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """The figures, or those of both models, for a report on something else."""
    if before is None:
        return "\n".join(_table(FIGURE_COLUMNS, map(figure_row, figures_of(results)), 3)) + "\n"
    return "\n".join(_compared_figures(results)) + "\n"


def _settings(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    config = results["config"]
    given = {name: value for name, value in config.items() if name not in ("model", "model_args", "force")}
    facts = {**config.get("model_args", {}), **given}
    facts |= {"lm-eval": results["lm_eval_version"], "phi3-mlx": results["phi3_mlx_version"]}
    return [(name, value) for name, value in facts.items() if value not in (None, False, [], {})]


def _compared(results: Mapping[str, Any], before: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
    pairs: list[PairedFigure] = results["against"]
    lines = [f"## Against {_code(str(before['config']['model']))}", "", *_compared_figures(results), ""]
    lines += _picture(pictures, "flips", "Questions lost and won by task")
    ours = {(task, sample["doc_id"], sample["filter"]): sample for task, sample in _all(results)}
    theirs = {(task, sample["doc_id"], sample["filter"]): sample for task, sample in _all(before)}
    for pair in pairs:
        samples = results["samples"].get(pair.task, ())
        if not any(pair.metric == right_metric(sample) for sample in samples[:1]):
            continue  # a group, or a metric that judges other answers than those that are told
        for way, places in (("lost", pair.lost), ("won", pair.won)):
            if not places:
                continue
            lines += [f"### {_escaped(pair.task)}, {_escaped(pair.metric)}: {way}", ""]
            for task, doc_id in places[:_LISTED]:
                key = (task, doc_id, pair.filtered)
                lines.append(f"- {doc_id}: {_flip(ours[key], theirs[key])}")
            if len(places) > _LISTED:
                lines.append(f"- and {len(places) - _LISTED:,} more in samples.jsonl")
            lines.append("")
    return lines


def _compared_figures(results: Mapping[str, Any]) -> list[str]:
    pairs: list[PairedFigure] = results["against"]
    return [
        *_table(PAIR_COLUMNS, map(pair_row, pairs), 2),
        "",
        *(f"- {_escaped(verdict)}" for verdict in verdicts(pairs)),
        "",
        "Both models answered the same questions. `lost` counts those that only the model before got right, `won` "
        "those that only this one did; `p` is McNemar's exact test of these two numbers; `KL` is how far the "
        "distributions over the choices are apart, in nats a question.",
    ]


def _all(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((task, sample) for task, samples in results["samples"].items() for sample in samples)


def _flip(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """A question that flipped, by its end, with both answers."""
    line, other = told(ours), told(theirs)
    question = _code(str(line.get("question") or ours["arguments"][0][0]), end=True)
    return f"{question} before {_code(str(other.get('answer')))}, now {_code(str(line.get('answer')))}"


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]], left: int) -> list[str]:
    """A table whose first `left` columns are texts and the others numbers."""
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * left}{'--:|' * (len(columns) - left)}",
        *(f"| {' | '.join(map(_escaped, row))} |" for row in rows),
    ]


def _picture(pictures: Mapping[str, str], name: str, caption: str) -> list[str]:
    return [f"![{caption}]({pictures[name]})", ""] if name in pictures else []


def _escaped(text: str) -> str:
    """A short text that Markdown takes as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(value: Any, *, end: bool = False) -> str:
    """A value between backticks, on one line and short: its beginning, or its `end`."""
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    if len(text) > _QUESTION_CHARACTERS:
        text = f"…{text[-_QUESTION_CHARACTERS:]}" if end else f"{text[:_QUESTION_CHARACTERS]}…"
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{room}{text}{room}{ticks}".replace("|", "\\|")
