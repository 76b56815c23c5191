"""Records that hold what an evaluation asks: a model that learnt them would be examined on what it was told."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .options import DecontaminateOptions, ReadOptions, WorkOptions, WriteOptions
from .records import DataPath, DataRecord, OnAdvance, Records, text_in
from .shards import ShardStep, run_shards
from .shingles import shingles, words_in
from .step import DataStep, check_output_folder

_SHORTEST_RUN = 8  # words, the least that GPT-3's authors looked for: shorter runs are everybody's


def decontaminate_data(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    against: DataPath | Sequence[DataPath],
    *,
    ngram: int = DecontaminateOptions.ngram,
    against_field: str | None = DecontaminateOptions.against_field,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    processes: int = WorkOptions.processes,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Leave out records that share `ngram` words in a row with evaluation sets, files `against`; the report.

    Case and punctuation do not count. Of an evaluation's record each text is looked for, or `against_field` alone; a
    text of fewer words as a whole, if it has 8 or more; the report counts those that are too short. Memory grows by
    12 bytes a word of the evaluation sets. Raises DataError, OptionError.
    """
    options = DecontaminateOptions(ngram, against_field)
    read, write = ReadOptions(field, lines, skip_broken), WriteOptions(compress, force)
    count = WorkOptions(processes).processes
    asked_read = ReadOptions(against_field, lines, skip_broken)
    asked = Records(against, asked_read, "reading the evaluation", progress, _text_if_named, name="against")
    check_output_folder(output, [Records(inputs, read, "comparing", None), asked], write)
    step = _Decontaminate("decontaminate", "comparing", read, options, questions=_Questions(asked, options))
    return run_shards(step, inputs, output, write, processes=count, progress=progress, also_read=[asked])


@dataclass(frozen=True)
class _Decontaminate(ShardStep):
    """The step over shards."""

    questions: _Questions | None = None

    def work(self, records: Iterable[DataRecord], step: DataStep) -> None:
        questions = self._known()
        for record in records:
            if match := questions.asked_in(record.text):
                step.remove(record, "asked by an evaluation", **match)
            else:
                step.keep(record)

    def facts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        questions = self._known()
        return {
            "against": {
                "inputs": questions.inputs,
                "records": questions.records,
                "texts": questions.texts,
                "too_short": questions.too_short,
            }
        }

    def _known(self) -> _Questions:
        assert self.questions is not None
        return self.questions


def _text_if_named(value: dict[str, Any], field: str | None) -> str:
    return "" if field is None else text_in(value, field)


class _Questions:
    """All runs of words that evaluations hold, by their length: hashes in order, and whose each is."""

    def __init__(self, records: Records, options: DecontaminateOptions):
        self.texts = self.too_short = 0
        self.inputs = [file.name for file in records.files]
        self._sources: list[str] = []
        runs: dict[int, tuple[array[int], array[int]]] = {}
        for record in records:
            self._sources.append(record.source)
            for text in [record.text] if options.against_field else _texts_in(record.value):
                word_list = words_in(text)
                length = min(options.ngram, len(word_list))
                self.texts += 1
                if length < min(_SHORTEST_RUN, options.ngram):
                    self.too_short += 1
                    continue
                hashes, places = runs.setdefault(length, (array("Q"), array("I")))
                given = shingles(word_list, length)
                hashes.frombytes(given.tobytes())
                places.extend([len(self._sources) - 1] * len(given))
        self.records = len(self._sources)
        if not runs:
            names = ", ".join(file.name for file in records.files)
            raise DataError(f"{names}: no text of {min(_SHORTEST_RUN, options.ngram)} words or more to look for")
        self._runs = {}
        for length, (hashes, places) in runs.items():
            unique, first = np.unique(np.array(hashes, np.uint64), return_index=True)
            self._runs[length] = unique, np.array(places, np.uint32)[first]

    def asked_in(self, text: str) -> dict[str, Any] | None:
        """The first run of a text that an evaluation holds, and where that asks it; None if there is none."""
        word_list = words_in(text)
        for length, (hashes, places) in self._runs.items():
            given = shingles(word_list, length)
            spots = np.minimum(np.searchsorted(hashes, given), len(hashes) - 1)
            equal = np.flatnonzero(hashes[spots] == given)
            if len(equal):
                first = int(equal[0])
                source = self._sources[int(places[spots[first]])]
                return {"asked_in": source, "words": " ".join(word_list[first : first + length]), "runs": len(equal)}
        return None


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)
