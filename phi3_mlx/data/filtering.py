"""Records that break rules of the literature, and what in them may say who a person is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, OptionError
from ..files import json_text
from ..values import path
from .classifier import TextClassifier, read_classifier
from .options import FilterOptions, ReadOptions, WorkOptions, WriteOptions
from .personal import PATTERNS, masked
from .quality import LINE_RULES, RULE_SETS, RULES, Rule, TextParts
from .records import DataPath, DataRecord, OnAdvance, keys_of_text, text_in
from .shards import ShardStep, run_shards
from .step import DataStep

_SETS = {**RULE_SETS, "pii": tuple(PATTERNS)}
_NAMES = (*LINE_RULES, *RULES, *PATTERNS)  # in the order that they work
_AT_LEAST = 0.5  # of being good, for a classifier
_VALUE_DIGITS = 6  # of a value in removed.jsonl
_Fault = tuple[str, Any, str]  # the rule, the text's value, and what it should be


def filter_data(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    *,
    rules: Sequence[str] | str | None = FilterOptions.rules,
    classifier: DataPath | None = FilterOptions.classifier,
    at_least: float | None = FilterOptions.at_least,
    pii: str = FilterOptions.pii,
    min_characters: int | None = FilterOptions.min_characters,
    max_characters: int | None = FilterOptions.max_characters,
    min_words: int | None = FilterOptions.min_words,
    max_words: int | None = FilterOptions.max_words,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    processes: int = WorkOptions.processes,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Keep the records that break none of the rules, without what the patterns of personal data find; the report.

    `rules`: names of rules, or of sets of them ("length", "gopher", "c4", "pii"); "-NAME" takes away what names before
    it gave. Rules of lines take single lines out of texts. `classifier`: a file of `train_filter`, or its folder, that
    gives a text a probability of being good of `at_least` (0.5). Without `rules` it is alone, else they are "gopher".
    `pii="drop"` removes a record in which a pattern finds something, "replace" writes "<EMAIL>" and so on there.
    Neither removed.jsonl nor report.json holds what was found.
    Raises DataError, also for a conversation under a rule of lines; OptionError.
    """
    judge_path = None if classifier is None else path(classifier, "classifier")
    options = FilterOptions(rules, judge_path, at_least, pii, min_characters, max_characters, min_words, max_words)
    judge = None if judge_path is None else read_classifier(judge_path)
    if judge is not None and not judge.slope:
        raise DataError(
            f"{judge_path} says nothing: it gives every text the same probability, as train-filter told; train it from "
            "other ratings"
        )
    step = _Filter(
        "filter",
        "filtering",
        ReadOptions(field, lines, skip_broken),
        options,
        judge=judge,
    )
    step.sieve(Counter())  # its faults, before anything is read
    count = WorkOptions(processes).processes
    return run_shards(step, inputs, output, WriteOptions(compress, force), processes=count, progress=progress)


@dataclass(frozen=True)
class _Filter(ShardStep):
    """The step over shards. All of them have the classifier as it was when the step began."""

    judge: TextClassifier | None = None

    def sieve(self, counts: Counter[str]) -> _Sieve:
        rules = self.options.rules
        if rules is None and self.judge is None:
            rules = "gopher"
        return _Sieve(() if rules is None else chosen_rules(rules), self.options, self.judge, counts)

    def digest(self) -> str:
        return "" if self.judge is None else self.judge.digest()

    def work(self, records: Iterable[DataRecord], step: DataStep) -> None:
        sieve = self.sieve(step.counts)
        for record in records:
            shown, fault = sieve.judged(record, self.read.field)
            if fault:
                step.remove(shown, **fault)
            else:
                step.keep(shown)

    def facts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return self.sieve(Counter(counts)).facts()


def chosen_rules(names: Sequence[str] | str) -> tuple[str, ...]:
    """The names of the single rules that names of rules and sets give. Raises OptionError."""
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        rule = name.removeprefix("-")
        if rule not in _SETS and rule not in _NAMES:
            raise OptionError(f"rules holds {name!r}; give {', '.join(_SETS)}, or {', '.join(_NAMES)}")
        given = set(_SETS.get(rule, (rule,)))
        if name != rule and not given & chosen:
            raise OptionError(f"rules takes {name!r} away, which no name before it gave; leave it out")
        chosen = chosen - given if name != rule else chosen | given
    if not chosen:
        raise OptionError(f"rules names none; give {', '.join(_SETS)}, or {', '.join(_NAMES)}")
    return tuple(name for name in _NAMES if name in chosen)


class _Sieve:
    """The rules at work, and their counts."""

    def __init__(
        self, active: Sequence[str], options: FilterOptions, judge: TextClassifier | None, counts: Counter[str]
    ):
        self._lines = [name for name in LINE_RULES if name in active]
        self._rules = {name: _bounded(rule, name, options) for name, rule in RULES.items() if name in active}
        for name in ("characters", "words"):
            if name not in active and _bounds(name, options) != (None, None):
                raise OptionError(f"min_{name}=N and max_{name}=N bound the rule {name!r}; add it to rules=A,B")
        if judge is not None:
            least = _AT_LEAST if options.at_least is None else options.at_least
            self._rules["classifier"] = Rule(lambda parts: judge.probability(parts.text), least=least)
        self._patterns, self._drops = [name for name in PATTERNS if name in active], options.pii == "drop"
        self._counts = counts  # of records that break "rule NAME", of "lines NAME", of "found NAME", "found in NAME"

    def judged(self, record: DataRecord, field: str | None) -> tuple[DataRecord, dict[str, Any]]:
        """The record, changed as rules of lines and patterns say, and why it is removed: {} if it stays."""
        if self._lines:
            record = self._with_good_lines(record, field)
        values = {name: rule.measure(parts) for parts in [TextParts(record.text)] for name, rule in self._rules.items()}
        broken = {name: value for name, value in values.items() if not self._rules[name].holds(value)}
        self._counts.update(f"rule {name}" for name in broken)
        faults: list[_Fault] = [(n, round(value, _VALUE_DIGITS), self._rules[n].said) for n, value in broken.items()]
        if self._lines and not record.text.strip():
            faults.append(("no lines left", 0, "at least 1"))
        if self._patterns:
            record, personal = self._masked(record, field)
            faults += personal
        if not faults:
            return record, {}
        (reason, value, bound), *others = faults
        return record, {"reason": reason, "value": value, "bound": bound, "also": {name: n for name, n, _ in others}}

    def _masked(self, record: DataRecord, field: str | None) -> tuple[DataRecord, list[_Fault]]:
        matches: Counter[str] = Counter()
        faults: list[_Fault] = []
        try:
            record = edited(record, field, lambda text: masked(text, self._patterns, matches))
        except DataError as error:  # two answers that differed in an address alone
            record = replace(record, text=masked(record.text, self._patterns, Counter()))
            faults = [("no example once masked", str(error), "an example")]
        for name, count in matches.items():
            self._counts.update({f"found {name}": count, f"found in {name}": 1})
        return record, [(name, count, "none") for name, count in matches.items()] if self._drops else faults

    def _with_good_lines(self, record: DataRecord, field: str | None) -> DataRecord:
        if keys_of_text(record.value, field) != [field or "text"]:
            raise DataError(
                f"{record.source}: {self._lines[0]!r} takes lines out of texts, and this is a conversation; leave out "
                f"{', '.join(self._lines)}"
            )
        return edited(record, field, self._good_lines)

    def _good_lines(self, text: str) -> str:
        kept = []
        for line in text.splitlines(keepends=True):
            bare = line.strip()
            rule = next((name for name in self._lines if bare and not LINE_RULES[name](bare)), None)
            if rule is None:
                kept.append(line)
            else:
                self._counts[f"lines {rule}"] += 1
        return "".join(kept)

    def facts(self) -> dict[str, Any]:
        """What the report says of each rule, whichever was the first that a record broke."""
        counts = self._counts
        return {
            "rules": {name: {"bound": r.said, "records": counts[f"rule {name}"]} for name, r in self._rules.items()},
            "line_rules": {name: {"lines": counts[f"lines {name}"]} for name in self._lines},
            "pii": {n: {"found": counts[f"found {n}"], "records": counts[f"found in {n}"]} for n in self._patterns},
        }


def _bounds(name: str, options: FilterOptions) -> tuple[int | None, int | None]:
    if name == "characters":
        return options.min_characters, options.max_characters
    return (options.min_words, options.max_words) if name == "words" else (None, None)


def _bounded(rule: Rule, name: str, options: FilterOptions) -> Rule:
    least, most = _bounds(name, options)
    rule = replace(rule, least=rule.least if least is None else least, most=rule.most if most is None else most)
    if rule.least > rule.most:
        raise OptionError(f"the rule {name!r} is {rule.said}, which no text is; change min_{name}=N or max_{name}=N")
    return rule


def edited(record: DataRecord, field: str | None, change: Callable[[str], str]) -> DataRecord:
    """The record with `change` made of its texts, also within messages; itself if that changes nothing."""
    keys = keys_of_text(record.value, field)
    value = {key: _changed(part, change) if key in keys else part for key, part in record.value.items()}
    if value == record.value:
        return record
    return DataRecord(record.source, value, text_in(value, field), json_text(value).encode())


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(part, change) for part in value]
    return {key: _changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value
