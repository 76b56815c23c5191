"""Records whose texts were there before, letter for letter or nearly."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .near import NearTexts
from .options import DedupeOptions, ReadOptions, WriteOptions
from .records import DataPath, OnAdvance, Records
from .statistics import text_digest
from .step import new_step


def dedupe_data(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    *,
    threshold: float = DedupeOptions.threshold,
    ngram: int = DedupeOptions.ngram,
    exact: bool = DedupeOptions.exact,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    compress: str | None = WriteOptions.compress,
    force: bool = WriteOptions.force,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Keep the first of records that say the same, or nearly (extra `data`); the report.

    Texts are near if their sets of `ngram` words in a row, without case and punctuation, have a Jaccard similarity of
    `threshold` or more. A record is removed if it is near one that was kept; of pairs right at the threshold 0.2 % are
    missed. With `exact` only equal texts are removed. Memory grows by 2 KB a record kept (at the usual threshold),
    however long it is, by 300 bytes with `exact`. Raises DataError, OptionError.
    """
    options = DedupeOptions(threshold, ngram, exact)
    records = Records(inputs, ReadOptions(field, lines, skip_broken), "comparing", progress)
    seen: dict[bytes, str] = {}
    with (
        tempfile.TemporaryFile() as file,
        new_step("dedupe", output, [records], WriteOptions(compress, force), asdict(options)) as step,
    ):
        near = None
        if not options.exact:
            near = NearTexts(options.threshold, options.ngram, file, "; exact=True does not")
        for record in records:
            first = seen.setdefault(text_digest(record.text), record.source)
            if first != record.source:
                step.remove(record, "exact duplicate", duplicate_of=first)
            elif near is not None and (twin := near.find_or_add(record.text, record.source)):
                step.remove(record, "near duplicate", duplicate_of=twin[0], jaccard=round(twin[1], 4))
            else:
                step.keep(record)
    return step.report
