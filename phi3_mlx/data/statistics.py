"""What data are like: how many records, how long, in which scripts, which come twice, what training would learn."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..files import json_text
from ..tuning.examples import Encoded, encode_records, histogram
from ..tuning.pairs import encode_labelled, encode_pairs, read_labelled, read_pair
from ..tuning.rows import read_row
from .formats import DATA_REPORT
from .options import ReadOptions, WriteOptions
from .records import DataPath, DataRecord, OnAdvance, Records, is_pair
from .step import Samples, new_folder, report_head

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_QUANTILES = (5, 25, 50, 75, 95, 99)
_REFUSED_SHOWN = 5
_ANY_LENGTH = sys.maxsize  # tokens


def data_stats(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    force: bool = WriteOptions.force,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """What files of records are like: the report, also written to report.json in the folder `output`.

    With a `tokenizer` lengths are in tokens too, and of what `tune` takes it says how many tokens would be learnt.
    Memory grows by about 100 bytes a record. Raises DataError, OptionError.
    """
    records = Records(inputs, ReadOptions(field, lines, skip_broken), "reading", progress)
    write = WriteOptions(force=force)
    if tokenizer is not None:
        from ..generation.loading import check_tokenizer

        check_tokenizer(tokenizer)
    if output is None:
        return _measured(records, tokenizer)
    with new_folder(output, [records], write) as folder:
        report = _measured(records, tokenizer)
        (folder / DATA_REPORT).write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
    return report


def _measured(records: Records, tokenizer: Tokenizer | None) -> dict[str, Any]:
    characters, tokens = array("q"), array("q")
    scripts: Counter[str] = Counter()
    seen: set[bytes] = set()
    repeated, samples, training = Samples(), Samples(), _Training(tokenizer)
    for record in records:
        characters.append(len(record.text))
        if tokenizer is not None:
            tokens.append(len(tokenizer.encode(record.text)))
        scripts.update(_scripts(record.text))
        if (digest := text_digest(record.text)) in seen:
            repeated.add(record)
        seen.add(digest)
        samples.add(record)
        training.add(record)
    letters = scripts.total() or 1
    return report_head("stats", [records], {}) | {
        "characters": _lengths(characters),
        "tokens": None if tokenizer is None else _lengths(tokens),
        "scripts": {name: count / letters for name, count in scripts.most_common()},
        "exact_duplicates": {"records": repeated.count, "samples": repeated.shown},
        "tune": training.facts(),
        "samples": samples.shown,
    }


def text_digest(text: str) -> bytes:
    """16 bytes that equal texts alone have."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class _Training:
    """What `tune` would make of the records."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._lengths, self._learnt = array("q"), 0
        self._objectives: Counter[str] = Counter()
        self._refused = 0
        self._faults: list[str] = []

    def add(self, record: DataRecord) -> None:
        try:
            objective, encoded = _encoded(record, self._tokenizer)
            if encoded is not None:
                self._lengths.extend(encoded.lengths)
                self._learnt += encoded.trained_tokens
        except DataError as error:
            self._refused += 1
            if len(self._faults) < _REFUSED_SHOWN:
                fault = str(error)
                self._faults.append(fault if fault.startswith(record.source) else f"{record.source}: {fault}")
        else:
            self._objectives[objective] += 1

    def facts(self) -> dict[str, Any]:
        counted = self._tokenizer is not None
        return {
            "examples": self._objectives.total(),
            "objectives": dict(self._objectives),
            "refused": self._refused,
            "faults": self._faults,
            "tokens": _lengths(self._lengths) if counted else None,
            "learnt_tokens": self._learnt if counted else None,
        }


def _encoded(record: DataRecord, tokenizer: Tokenizer | None) -> tuple[str, Encoded | None]:
    """The objective that a record is an example for, and its tokens with a tokenizer. Raises DataError."""
    if is_pair(record.value):
        pair = read_pair(record.value, record.source, {})
        return "dpo", None if tokenizer is None else encode_pairs([pair], tokenizer, max_length=_ANY_LENGTH)
    if "completion" in record.value and record.value.get("label") in (0, 1):
        answer = read_labelled(record.value, record.source, {})
        return "kto", None if tokenizer is None else encode_labelled(
            [answer], tokenizer, max_length=_ANY_LENGTH, batch_size=1
        )
    row = read_row(record.value, record.source, {})
    return "sft", None if tokenizer is None else encode_records([row], tokenizer, max_length=_ANY_LENGTH)


def _lengths(lengths: array[int]) -> dict[str, Any]:
    """Total, extremes, mean, quantiles (the length that these per cent do not exceed) and a histogram."""
    if not lengths:
        return {"total": 0}
    ordered = sorted(lengths)
    return {
        "total": sum(ordered),
        "shortest": ordered[0],
        "longest": ordered[-1],
        "mean": sum(ordered) / len(ordered),
        "quantiles": {str(part): ordered[-(-len(ordered) * part // 100) - 1] for part in _QUANTILES},
        "histogram": [{"from": first, "to": last, "records": count} for first, last, count in histogram(ordered)],
    }


def _scripts(text: str) -> Counter[str]:
    """How many letters of a text are in which script."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            scripts[_script(character)] += count
    return scripts


@lru_cache(maxsize=2**16)
def _script(character: str) -> str:
    """The script of a letter, by how Unicode's name of it begins: "Latin", "Cyrillic", "CJK"."""
    first = unicodedata.name(character, "other").partition(" ")[0]
    return first if first == "CJK" else first.capitalize()
