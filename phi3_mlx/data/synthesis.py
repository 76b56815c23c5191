"""Records that a model makes: from topics or seed texts to a folder that training reads."""

from __future__ import annotations

import hashlib
import tempfile
import time as clock
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__ as version
from ..engine.identity import model_fingerprint
from ..errors import DataError, OptionError
from ..files import json_text
from ..generation.answers import encode_prompt
from ..generation.loading import check_loaded, check_tokenizer
from ..models.decoder import Model
from ..option import arguments
from ..store.atomic import new_files
from ..store.line_file import alone_in, disk_faults
from ..values import flag, text
from .attempts import Attempt, AttemptJournal, Maker, attempts_of, seed_of
from .formats import DATA_REPORT
from .kinds import KINDS, Subject, SynthesisKind, checked_template, prompt_of
from .near import NearTexts
from .options import ReadOptions
from .records import Advance, DataPath, DataRecord, OnAdvance, Records
from .step import DataStep, output_place, report_head, step_files
from .synthesis_options import SynthesisOptions
from .verifying import check_of

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

JOURNAL_FILE = ".journal.jsonl"  # hidden: a folder's readers pass it over
_PROMPTS_SHOWN = 3
# When it is enough, which may be another time when a run goes on.
_BUDGETS = ("records", "tokens", "time", "attempts")


def synthesize_data(
    model: Model,
    tokenizer: Tokenizer,
    output: DataPath,
    *,
    name: str,
    topics: DataPath | Sequence[DataPath] | None = None,
    seeds: DataPath | Sequence[DataPath] | None = None,
    prompt: str | None = None,
    unlike: DataPath | Sequence[DataPath] | None = None,
    kind: str = SynthesisOptions.kind,
    records: int | None = SynthesisOptions.records,
    tokens: int | None = SynthesisOptions.tokens,
    time: float | str | None = SynthesisOptions.time,
    attempts: int | None = SynthesisOptions.attempts,
    temperature: float = SynthesisOptions.temperature,
    top_p: float = SynthesisOptions.top_p,
    max_tokens: int = SynthesisOptions.max_tokens,
    max_characters: int | None = SynthesisOptions.max_characters,
    seed: int = SynthesisOptions.seed,
    parallel: int = SynthesisOptions.parallel,
    threshold: float = SynthesisOptions.threshold,
    ngram: int = SynthesisOptions.ngram,
    verify: str | None = SynthesisOptions.verify,
    agreement: float = SynthesisOptions.agreement,
    min_logprob: float = SynthesisOptions.min_logprob,
    min_words: int | None = SynthesisOptions.min_words,
    max_words: int | None = SynthesisOptions.max_words,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    force: bool = False,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Let a model make records about `topics` or from `seeds` (extras `data` and `schema`); the report.

        synthesize_data(*load("phi-3.5-mini-4bit"), "made", name="phi-3.5-mini-4bit", topics="topics.txt",
                        kind="questions", records=1000)

    `topics` are files whose lines are topics (or records), `seeds` files of records as other steps read them, with
    `field` and `lines`; one of the two. `prompt` is a template with {topic} or {text} in place of the usual one;
    `unlike` are files whose texts, too, no record may be near. `name`: what the records call the model.

    Each attempt has its subject in turn, its own seed, and JSON of a fixed schema. `verify`: "recompute" answers a
    question again at temperature 0 and compares; "score" asks for the mean log-probability of the answer, and of two
    answers for a greater one of the chosen; "none". Memory grows by the subjects, and some kilobytes an attempt.

    The folder `output` holds a journal from the beginning. The same call again goes on from it and ends with the
    records of a run that was not stopped, bit for bit; with a larger budget it makes more. `force` begins anew. Ctrl-C
    writes the records that there are.

    Raises DataError for files that are faulty, or of another synthesis; OptionError; MemoryLimitError.
    """
    options = SynthesisOptions(**arguments(SynthesisOptions, locals()))
    check_loaded(model)
    check_tokenizer(tokenizer)
    label = text(name, "name")
    made_of = read_subjects(topics, seeds, ReadOptions(field, lines, skip_broken), prompt, options)
    others = (
        None
        if unlike is None
        else Records(unlike, ReadOptions(skip_broken=skip_broken), "reading", progress, name="unlike")
    )
    inputs = [made_of.records, *([] if others is None else [others])]
    place = output_place(output, inputs)
    anew = flag(force, "force")
    _check_place(place, output)
    with tempfile.TemporaryFile() as file, alone_in(place):
        near = NearTexts(options.threshold, options.ngram, file, "")
        others_digest = hashlib.sha256()
        for record in others or ():
            near.find_or_add(record.text, record.source)
            others_digest.update(record.line + b"\n")
        identity = {
            "model": {"name": label, "fingerprint": model_fingerprint(model)},
            "version": version,
            "prompt": made_of.template,
            "topics or seeds": _digest(made_of.subjects),
            "unlike": others_digest.hexdigest()[:32],
            **{key: value for key, value in asdict(options).items() if key not in _BUDGETS},
        }
        if anew:
            (place / JOURNAL_FILE).unlink(missing_ok=True)
        journal = AttemptJournal(place / JOURNAL_FILE, identity, made_of.kind.parts)
        maker = Maker(model, tokenizer, made_of.kind, options, made_of.subjects, made_of.template, near)
        run = _Synthesis(maker, made_of, options, identity, inputs, progress)
        try:
            run.make(journal)
        except BaseException:  # what was made is there however this ends
            run.write(place)
            raise
        return run.write(place)


@dataclass(frozen=True)
class SubjectSource:
    """What records are made of: the subjects, the template of the prompt, the kind."""

    kind: SynthesisKind
    subjects: list[Subject]
    template: str
    records: Records


def read_subjects(
    topics: DataPath | Sequence[DataPath] | None,
    seeds: DataPath | Sequence[DataPath] | None,
    read: ReadOptions,
    prompt: str | None,
    options: SynthesisOptions,
) -> SubjectSource:
    """The subjects of files, and what is asked about them. Raises DataError, OptionError."""
    kind, template, records, is_seed = check_subjects(topics, seeds, read, prompt, options)
    subjects = [Subject(record.source, record.text.strip(), is_seed) for record in records if record.text.strip()]
    if not subjects:
        name = records.files[0].name
        raise DataError(f"{name} holds empty texts alone; give {'seed texts' if is_seed else 'topics'}")
    return SubjectSource(kind, subjects, template, records)


def check_subjects(
    topics: DataPath | Sequence[DataPath] | None,
    seeds: DataPath | Sequence[DataPath] | None,
    read: ReadOptions,
    prompt: str | None,
    options: SynthesisOptions,
) -> tuple[SynthesisKind, str, Records, bool]:
    """As `read_subjects`, before anything is read: kind, template, the records to read, whether they are seeds."""
    if (topics is None) == (seeds is None):
        raise OptionError("records are made of topics or of seed texts: give topics=FILE or seeds=FILE, one of the two")
    kind, is_seed = KINDS[options.kind], seeds is not None
    check_of(kind, options)
    given: Any = seeds if is_seed else topics
    read = ReadOptions(read.field, read.lines if is_seed else True, read.skip_broken)
    records = Records(given, read, "reading", None, name="seeds" if is_seed else "topics")
    template = kind.template(seeds=is_seed) if prompt is None else text(prompt, "prompt")
    return kind, checked_template(template, seeds=is_seed), records, is_seed


def first_prompts(made_of: SubjectSource, options: SynthesisOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What would be asked first, without a model: prompts, their tokens, and the schema of the answers."""
    shown = made_of.subjects[:_PROMPTS_SHOWN]
    prompts = [prompt_of(made_of.template, subject) for subject in shown]
    return {
        "subjects": len(made_of.subjects),
        "broken": report_head("", [made_of.records], {})["broken"],
        "schema": made_of.kind.schema(options),
        "verify": check_of(made_of.kind, options),
        "prompts": [
            {
                "source": subject.source,
                "prompt": prompt,
                "tokens": len(encode_prompt(tokenizer, prompt)),
                "seed": seed_of(options.seed, number),
            }
            for number, (subject, prompt) in enumerate(zip(shown, prompts, strict=True))
        ],
    }


class _Synthesis:
    """A run: the attempts that count, in their order, until a budget ends it."""

    def __init__(
        self,
        maker: Maker,
        made_of: SubjectSource,
        options: SynthesisOptions,
        identity: dict[str, Any],
        inputs: Sequence[Records],
        progress: OnAdvance | None,
    ):
        self._maker, self._made_of, self._options = maker, made_of, options
        self._identity, self._inputs, self._progress = identity, inputs, progress
        self._attempts: list[Attempt] = []
        self._kept = self._tokens = 0
        self._ended_by = "an interruption"

    def make(self, journal: AttemptJournal) -> None:
        """Count attempts, and make more, until it is enough."""
        began, group = clock.monotonic(), self._options.parallel
        for attempt in attempts_of(self._maker, journal):
            self._attempts.append(attempt)
            self._kept += not attempt.reason
            self._tokens += attempt.tokens
            self._tell()
            out_of_time = self._options.time is not None and clock.monotonic() - began >= float(self._options.time)
            if ended := self._enough(out_of_time and len(self._attempts) % group == 0):
                self._ended_by = ended
                return

    def _enough(self, out_of_time: bool) -> str:
        """The budget that is used up; "" if none is."""
        options = self._options
        if options.wanted is not None and self._kept >= options.wanted:
            return "records"
        if options.tokens is not None and self._tokens >= options.tokens:
            return "tokens"
        if options.most_attempts is not None and len(self._attempts) >= options.most_attempts:
            return "attempts"
        return "time" if out_of_time else ""

    def _tell(self) -> None:
        if self._progress is None:
            return
        wanted, tokens = self._options.wanted, self._options.tokens
        done, total = (self._kept, wanted) if wanted else (self._tokens, tokens or 0)
        stage = f"making, {len(self._attempts) - self._kept:,} refused"
        self._progress(Advance(stage, min(done, total), total, self._kept, "records" if wanted else "tokens"))

    def write(self, place: Path) -> dict[str, Any]:
        """Records, refused attempts and the report, which is returned, all put in place at once; {} of no attempts."""
        if not self._attempts:
            return {}
        with disk_faults(place), new_files(place, DATA_REPORT) as folder:
            with step_files(folder) as step:
                for attempt in self._attempts:
                    self._put(attempt, step)
            made_with = {key: value for key, value in self._identity.items() if key not in asdict(self._options)}
            report = report_head("synthesize", self._inputs, asdict(self._options)) | step.outcome()
            report |= made_with | {
                "verify": check_of(self._made_of.kind, self._options),
                "attempts": len(self._attempts),
                "tokens": self._tokens,
                "ended_by": self._ended_by,
            }
            (folder / DATA_REPORT).write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
        return report

    def _put(self, attempt: Attempt, step: DataStep) -> None:
        subject, source = self._maker.subject_of(attempt.number), f"attempt {attempt.number}"
        if attempt.reason:
            record = DataRecord(source, {}, attempt.text, b"")
            step.remove(
                record, attempt.reason, subject=subject.source, seed=attempt.seed, **attempt.facts, made=attempt.parts
            )
            return
        value = self._made_of.kind.record(attempt.parts, subject)
        value["provenance"] = {
            "kind": self._options.kind,
            "model": self._identity["model"]["name"],
            "fingerprint": self._identity["model"]["fingerprint"],
            "subject": subject.source,
            "prompt": self._maker.prompt_of(attempt.number),
            "seed": attempt.seed,
            "temperature": self._options.temperature,
            "top_p": self._options.top_p,
            "version": version,
            **attempt.facts,
        }
        step.keep(DataRecord(source, value, attempt.text, json_text(value).encode()))


def _check_place(place: Path, output: DataPath) -> None:
    """DataError for a folder that holds something else than a synthesis."""
    if not place.exists() or (place / JOURNAL_FILE).is_file():
        return
    if not place.is_dir():
        raise DataError(f"{output} is not a directory; name another")
    if any(place.iterdir()):
        raise DataError(f"{output} exists already and holds no synthesis; name another directory")


def _digest(subjects: Sequence[Subject]) -> str:
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(json_text(subject).encode() + b"\n")
    return digest.hexdigest()[:32]
