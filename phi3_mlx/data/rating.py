"""Texts that a model rates, and how likely they are to it: a text is read, and nothing is decoded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..engine.identity import model_fingerprint
from ..engine.prefixes import PrefixStore
from ..errors import DataError, OptionError
from ..files import json_text
from ..generation.answers import encode_prompt
from ..generation.loading import check_loaded, check_tokenizer
from ..generation.scoring import Score, batch_score
from ..models.decoder import Model
from ..paths import expanded
from ..values import text as as_text
from .options import ReadOptions, ScoreOptions, WriteOptions
from .records import DataPath, DataRecord, OnAdvance, Records
from .rubric import EDUCATIONAL, TextRubric, make_rubric
from .score_journal import ScoreJournal, score_journal
from .statistics import text_digest
from .step import Samples, check_output_folder, new_step

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_TEXTS_AT_ONCE = 64  # a run that is killed loses what it knew of these
_SHARED = 256 * 2**20  # bytes of what was read: the rubric, and texts until they give way
_LONGEST_TOKEN = 32  # characters, where a text is cut before it is encoded
_SCORE_DIGITS = 5  # of a score in a record
_SCORE_BINS, _ENDS_SHOWN = 10, 5
_NATS_A_TOKEN, _BITS_A_CHARACTER = "nats_per_token", "bits_per_character"
_SCORE_KEYS = {"rating": ("rating", "rating_mass"), "perplexity": (_NATS_A_TOKEN, _BITS_A_CHARACTER), "cut": ("cut",)}
_WIDTHS = {_NATS_A_TOKEN: 0.5, _BITS_A_CHARACTER: 0.25}  # of the histograms' bins


def score_data(
    model: Model,
    tokenizer: Tokenizer,
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    *,
    rubric: str = EDUCATIONAL,
    scale: Sequence[str] | str = ScoreOptions.scale,
    rating: bool = ScoreOptions.rating,
    perplexity: bool = ScoreOptions.perplexity,
    max_length: int = ScoreOptions.max_length,
    raw: bool = ScoreOptions.raw,
    name: str | None = ScoreOptions.name,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Let a model rate each text by a rubric; the report. Records are kept, with these keys added:

    - `rating`: the expected value of the answer, by the probabilities of the answers of `scale` behind the `rubric`,
      which is read once for 64 texts. `rating_mass`: how probable it is that the model answers one of them at all.
    - with `perplexity`: `nats_per_token`, the text's negative log-likelihood (behind BOS) a token, and
      `bits_per_character`; null for an empty text.
    - `cut`: true for a text of more than `max_length` tokens, of which only those were read.

    `rubric` says with {text} where the text is put, or it comes at the end. `scale`: numbers, or "NAME=VALUE". `name`
    begins the keys, as "NAME_rating", where records have such already. A run that is stopped leaves what it has in the
    folder `output`.unfinished, and the same call goes on from there. Raises DataError, OptionError, MemoryLimitError.
    """
    check_loaded(model)
    check_tokenizer(tokenizer)
    options = ScoreOptions(scale, rating, perplexity, max_length, raw, name)
    rater = _Rater(model, tokenizer, make_rubric(as_text(rubric, "rubric"), options.scale), options)
    records = Records(inputs, ReadOptions(field, lines, skip_broken), "scoring", progress)
    asked = asdict(options) | {"rubric": rubric}
    identity = {"model": model_fingerprint(model), **asked}
    del identity["name"]
    summary, write = _Summary(rater), WriteOptions(compress, force)
    check_output_folder(output, [records], write)
    # The journal is outside: its scores go when the folder is in its place, not before the last byte is written.
    with (
        score_journal(expanded(output), identity, rater.keys) as journal,
        new_step("score", output, [records], write, asked) as step,
    ):
        for record, score in _scored(records, rater, journal):
            summary.add(record, score)
            step.keep(record, line=_with_keys(record, score, rater.prefix))
        step.facts |= {"model": identity["model"], **summary.facts()}
    return step.report


def _scored(
    records: Records, rater: _Rater, journal: ScoreJournal
) -> Iterator[tuple[DataRecord, dict[str, float | bool | None]]]:
    """Each record with its score: of the journal, and behind its end of the model."""
    waiting = iter(records)
    while some := [*islice(waiting, _TEXTS_AT_ONCE)]:
        for record in some:
            rater.check_keys(record)
        digests = [text_digest(record.text).hex() for record in some]
        known = []
        for digest in digests:
            if (score := journal.known(digest)) is None:
                break
            known.append(score)
        if len(known) < len(some):
            # Of all, also where some are known: what is read together decides the last digits.
            scores = rater.scores([record.text for record in some])
            for digest, score in [*zip(digests, scores, strict=True)][len(known) :]:
                journal.add(digest, score)
                known.append(score)
        yield from zip(some, known, strict=True)


class _Rater:
    """A model that is asked about texts. OptionError where the rubric leaves no room for a text."""

    def __init__(self, model: Model, tokenizer: Tokenizer, rubric: TextRubric, options: ScoreOptions):
        self.rubric, self.options = rubric, options
        self.prefix = f"{options.name}_" if options.name else ""
        self.keys = [key for what, keys in _SCORE_KEYS.items() if getattr(options, what, True) for key in keys]
        self._model, self._tokenizer = model, tokenizer
        around = len(encode_prompt(tokenizer, self._prompt(""), raw=options.raw)) if options.rating else 0
        around += max(len(tokenizer.encode(choice)) + 1 for choice in rubric.choices)
        self._most = min(options.max_length, model.config.max_position_embeddings - around - 2)
        if self._most < 1:
            raise OptionError(
                f"rubric takes {around:,} tokens of the {model.config.max_position_embeddings:,} that the model reads, "
                "and leaves none for a text; give a shorter one"
            )

    def check_keys(self, record: DataRecord) -> None:
        """DataError where a record has one of the keys that are to be added."""
        for key in (f"{self.prefix}{key}" for key in self.keys):
            if key in record.value:
                raise DataError(f"{record.source}: has a key {key!r} already; name the new ones with name='other'")

    def scores(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """What is said of each text, of one or more. DataError for a model whose numbers are none."""
        read = [self._cut(text) for text in texts]
        told: list[dict[str, Any]] = [{} for _ in texts]
        if self.options.rating:
            for score, answers in zip(told, self._answers(read), strict=True):
                value, mass = self.rubric.expected([answer.total for answer in answers])
                score |= {"rating": _rounded(value), "rating_mass": _rounded(mass)}
        if self.options.perplexity:
            for score, likely, text in zip(told, self._likelihoods(read), read, strict=True):
                score |= _perplexity(likely, len(text))
        for score, text, part in zip(told, texts, read, strict=True):
            score["cut"] = len(part) < len(text)
        return told

    def _answers(self, texts: Sequence[str]) -> list[list[Score]]:
        asked = [(self._prompt(text), self.rubric.choices) for text in texts]
        prefixes = PrefixStore(_SHARED)  # a new one, so that no rating depends on the texts that were read before
        return batch_score(self._model, self._tokenizer, asked, raw=self.options.raw, prefixes=prefixes)

    def _likelihoods(self, texts: Sequence[str]) -> list[Score | None]:
        scores = iter(batch_score(self._model, self._tokenizer, [("", [text]) for text in texts if text], raw=True))
        return [next(scores)[0] if text else None for text in texts]

    def _prompt(self, text: str) -> Any:
        question = self.rubric.question(text)
        return question if self.options.raw else [{"role": "user", "content": question}]

    def _cut(self, text: str) -> str:
        """The text, or as much of its beginning as is read."""
        part = text[: self._most * _LONGEST_TOKEN]
        while (count := len(self._tokenizer.encode(part))) > self._most:
            part = part[: len(part) * self._most // count]
        return part


def _perplexity(score: Score | None, characters: int) -> dict[str, float | None]:
    if score is None:
        return {_NATS_A_TOKEN: None, _BITS_A_CHARACTER: None}
    return {
        _NATS_A_TOKEN: _rounded(-score.total / len(score.tokens)),
        _BITS_A_CHARACTER: _rounded(-score.total / math.log(2) / characters),
    }


def _rounded(value: float) -> float:
    if not math.isfinite(value):
        raise DataError(f"the model says {value} of a text, which is no number; is it damaged?")
    return round(value, _SCORE_DIGITS)


def _with_keys(record: DataRecord, score: dict[str, Any], prefix: str) -> bytes:
    """The record's line as it was read, with the score's keys behind."""
    added = {f"{prefix}{key}": value for key, value in score.items()}
    return record.line[:-1].rstrip() + b", " + json_text(added).encode()[1:]


class _Summary:
    """What the report says of the scores: histograms, means, those that are highest and lowest."""

    def __init__(self, rater: _Rater):
        values = rater.rubric.values
        self._widths = {"rating": (max(values) - min(values)) / _SCORE_BINS, "rating_mass": 1 / _SCORE_BINS, **_WIDTHS}
        self._first = {"rating": min(values)}
        self._last = {"rating": _SCORE_BINS - 1, "rating_mass": _SCORE_BINS - 1}  # the highest value is in the last bin
        self._main = "rating" if rater.options.rating else _NATS_A_TOKEN
        self._sums: Counter[str] = Counter()
        self._bins: dict[str, Counter[int]] = {}
        self._ends: dict[str, list[tuple[float, int, dict[str, Any]]]] = {"highest": [], "lowest": []}
        self._cut = self._count = 0

    def add(self, record: DataRecord, score: dict[str, Any]) -> None:
        self._count += 1
        self._cut += bool(score["cut"])
        for name, value in score.items():
            if name != "cut" and value is not None:
                place = int((value - self._first.get(name, 0)) / self._widths[name])
                self._bins.setdefault(name, Counter())[min(place, self._last.get(name, place))] += 1
                self._sums[name] += value
        if (value := score[self._main]) is not None:
            for end, sign in (("highest", -1), ("lowest", 1)):
                self._note(end, sign * value, record, value)

    def _note(self, end: str, key: float, record: DataRecord, value: float) -> None:
        best = self._ends[end]
        if len(best) < _ENDS_SHOWN or key < best[-1][0]:
            sample = Samples()
            sample.add(record, **{self._main: value})
            best.append((key, self._count, sample.shown[0]))
            best.sort(key=lambda item: item[:2])
            del best[_ENDS_SHOWN:]

    def facts(self) -> dict[str, Any]:
        """By name of a score its mean and histogram, without empty bins; how many texts were cut."""
        facts: dict[str, Any] = {"cut": self._cut, "scores": {}}
        for name, bins in self._bins.items():
            first, width = self._first.get(name, 0), self._widths[name]
            facts["scores"][name] = {
                "mean": self._sums[name] / bins.total(),
                "histogram": [
                    {"from": first + place * width, "to": first + (place + 1) * width, "records": bins[place]}
                    for place in sorted(bins)
                ],
            }
        return facts | {end: [sample for *_, sample in best] for end, best in self._ends.items()}
