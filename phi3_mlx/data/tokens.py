"""Texts to token shards, which pretraining reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from ..pretraining.shards import ShardWriter, tokenizer_fingerprint
from ..tuning.examples import encode_record
from ..tuning.rows import Record
from .options import ReadOptions, WorkOptions, WriteOptions
from .records import DataPath, DataRecord, OnAdvance
from .shards import ShardStep, run_shards
from .step import Samples

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


def tokenize_data(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    tokenizer: Tokenizer,
    *,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    force: bool = WriteOptions.force,
    processes: int = WorkOptions.processes,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Write records as token shards into the folder `output`, for `pretrain`; the report.

    A record is a document: the text as `tune` learns {"text": ...}, with its end. Texts that are empty, or of which the
    tokenizer makes nothing, are left out. A process has one record in memory at a time. What a run that was stopped had
    finished is not done again. Raises DataError, OptionError.
    """
    if tokenizer.eos_token_id is None:
        raise OptionError("this tokenizer has no token that ends a text (eos_token); name one in tokenizer_config.json")
    options = _Vocabulary(tokenizer_fingerprint(tokenizer))
    step = _Tokenize("tokenize", "tokenizing", ReadOptions(field, lines, skip_broken), options, tokenizer=tokenizer)
    count = WorkOptions(processes).processes
    return run_shards(step, inputs, output, WriteOptions(force=force), processes=count, progress=progress)


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer's fingerprint, which the report names: shards of another are made anew."""

    tokenizer: str


@dataclass(frozen=True)
class _Tokenize(ShardStep):
    """The step over shards."""

    tokenizer: Tokenizer | None = None

    @contextmanager
    def files(self, folder: Path, compress: str | None = None) -> Iterator[TokenFiles]:
        assert self.tokenizer is not None
        with ExitStack() as stack:
            made = TokenFiles(ShardWriter(folder, self.tokenizer.vocab_size, stack))
            yield made
        made.writer.finish(self.options.tokenizer)

    def work(self, records: Iterable[DataRecord], step: TokenFiles) -> None:
        assert self.tokenizer is not None
        for record in records:
            example = encode_record(Record(record.source, None, record.text), self.tokenizer, "all", lambda _: None)
            if not len(example):
                step.removed["no tokens" if record.text else "empty"].add(record)
                continue
            step.writer.add(example.ids, len(record.text))
            step.samples.add(record)


class TokenFiles:
    """Token shards that are written, and what the report says of them."""

    def __init__(self, writer: ShardWriter):
        self.writer, self.samples = writer, Samples()
        self.removed = {"empty": Samples(), "no tokens": Samples()}
        self.counts: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        removed = {reason: samples.state() for reason, samples in self.removed.items()}
        return {"shards": self.writer.shards, "kept": self.samples.state(), "removed": removed}

    def take(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.writer.take(folder, state["shards"])
        self.samples.take(state["kept"])
        for reason, samples in state["removed"].items():
            self.removed[reason].take(samples)

    def outcome(self) -> dict[str, Any]:
        writer, removed = self.writer, {reason: some for reason, some in self.removed.items() if some.count}
        if not writer.documents:
            raise DataError("there is no text in these records, of which no tokens come; give some")
        return {
            "kept": writer.documents,
            "removed": sum(samples.count for samples in removed.values()),
            "reasons": {reason: {"records": some.count, "samples": some.shown} for reason, some in removed.items()},
            "outputs": {
                "tokens": {
                    "records": writer.documents,
                    "characters": writer.characters,
                    "tokens": writer.tokens,
                    "samples": self.samples.shown,
                }
            },
        }
