"""Attempts of a model at records: made in groups, each kept in a journal, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import json_text
from ..generation.answering import FinishedAnswer, answer_each
from ..generation.answers import encode_prompt
from ..generation.request import Request
from ..models.decoder import Model
from ..store.line_file import LineFile, damaged, head_of
from .kinds import Subject, SynthesisKind, prompt_of
from .near import NearTexts
from .synthesis_options import SynthesisOptions
from .verifying import Verdict, Verifier, broken_rule, fits, over_bounds

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_JOURNAL_FORMAT = 1
_GROUP = "attempts"  # the key of the journal's lines behind the first
_ATTEMPT_TYPES = {
    "number": int,
    "seed": int,
    "parts": dict,
    "reason": str,
    "facts": dict,
    "tokens": int,
}  # of an attempt


@dataclass(frozen=True)
class Attempt:
    """What a model made of a subject. `reason`: why it is refused, "" if it is kept; `facts`: what was found out."""

    number: int  # from 0
    seed: int
    parts: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # that the model made, also to verify

    @property
    def text(self) -> str:
        """What others are compared with: all that was made."""
        return "\n\n".join(self.parts.values())


class AttemptJournal:
    """The groups of attempts in a file of lines; their texts have `keys`.

    Raises DataError for a file of another run than `identity` says.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], keys: Collection[str]):
        self._file = LineFile(path)
        if len(self._file.lines) == 1:  # nothing was made yet
            path.unlink()
            self._file = LineFile(path)
        head = head_of(_GROUP, _JOURNAL_FORMAT, identity)
        self._file.begin(head, "name another directory, or begin anew with force=True")
        try:
            self.attempts = [Attempt(**attempt) for line in self._file.lines[1:] for attempt in line[_GROUP]]
        except (KeyError, TypeError):
            raise damaged(path, "a line holds no attempts") from None
        for number, attempt in enumerate(self.attempts):
            if not _is_attempt(attempt, number, {*keys}):
                raise damaged(path, f"what it has of attempt {number} is no attempt")

    def add(self, group: Sequence[Attempt]) -> None:
        self._file.add({_GROUP: [asdict(attempt) for attempt in group]})


class Maker:
    """Makes attempts in their order. Each depends on its number and on what was kept before alone.

    A group is made and verified together; then each of it is compared with all that were kept.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        kind: SynthesisKind,
        options: SynthesisOptions,
        subjects: Sequence[Subject],
        template: str,
        near: NearTexts,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._kind, self._options, self._subjects, self._template = kind, options, subjects, template
        self._near = near
        self._verifier = Verifier(model, tokenizer, kind, options)
        self._schema = json_text(kind.schema(options))

    def subject_of(self, number: int) -> Subject:
        return self._subjects[number % len(self._subjects)]

    def prompt_of(self, number: int) -> str:
        return prompt_of(self._template, self.subject_of(number))

    def remember(self, attempt: Attempt) -> None:
        """Compare later attempts with this one, which an earlier run kept."""
        if not attempt.reason:
            self._near.find_or_add(attempt.text, _source_of(attempt.number))

    def group(self, first: int) -> list[Attempt]:
        """The attempts from number `first`. Raises what `generate` raises."""
        numbers = range(first, first + self._options.parallel)
        seeds = [seed_of(self._options.seed, number) for number in numbers]
        answers = self._answers(numbers, seeds)
        attempts = [self._read(number, seed, answers.get(number)) for number, seed in zip(numbers, seeds, strict=True)]
        good = [n for n, attempt in enumerate(attempts) if not attempt.reason]
        verdicts = self._verifier.verdicts([(attempts[n].parts, self.subject_of(first + n)) for n in good])
        for n, verdict in zip(good, verdicts, strict=True):
            attempts[n] = _judged(attempts[n], verdict)
        return [self._compared(attempt) for attempt in attempts]

    def _answers(self, numbers: Sequence[int], seeds: Sequence[int]) -> dict[int, FinishedAnswer]:
        """The answers by the attempts' numbers, without prompts that leave no room for one."""
        asked = []
        for number, seed in zip(numbers, seeds, strict=True):
            ids = encode_prompt(self._tokenizer, self.prompt_of(number))
            if fits(self._model, len(ids), self._options):
                asked.append((number, ids, self._request(seed)))
        prompts = [(ids, request) for _, ids, request in asked]
        answers = answer_each(self._model, self._tokenizer, prompts)
        return {asked[place][0]: answer for place, answer in answers}

    def _request(self, seed: int) -> Request:
        options = self._options
        return Request(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=seed,
            schema=self._schema,
            lookup=0,
        )

    def _read(self, number: int, seed: int, answer: FinishedAnswer | None) -> Attempt:
        """An attempt, judged by its text alone."""
        if answer is None:
            return Attempt(number, seed, reason="prompt too long")
        if answer.finish_reason == "length":
            return Attempt(number, seed, reason="cut by max_tokens", tokens=answer.tokens)
        made = self._kind.read(answer.text)
        try:
            "".join(made.values()).encode()
        except UnicodeEncodeError:
            return Attempt(number, seed, reason="half a character", tokens=answer.tokens)
        attempt = Attempt(number, seed, {key: text.strip() for key, text in made.items()}, tokens=answer.tokens)
        broken = over_bounds(self._kind, self._options, made) or broken_rule(self._kind, self._options, attempt.parts)
        if broken is None and (twin := self._near.find(attempt.text)):  # so that no time is lost on verifying it
            broken = _duplicate(twin)
        return attempt if broken is None else _judged(attempt, broken)

    def _compared(self, attempt: Attempt) -> Attempt:
        twin = None if attempt.reason else self._near.find_or_add(attempt.text, _source_of(attempt.number))
        return attempt if twin is None else _judged(attempt, _duplicate(twin))


def seed_of(seed: int, number: int) -> int:
    """The seed of an attempt: as good as random, so that runs of other seeds share none."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def attempts_of(maker: Maker, journal: AttemptJournal) -> Iterator[Attempt]:
    """All attempts without end, those of the journal first; a new group is in the journal before its first comes."""
    for attempt in journal.attempts:
        maker.remember(attempt)
    yield from journal.attempts
    first = len(journal.attempts)
    while True:
        group = maker.group(first)
        journal.add(group)
        yield from group
        first += len(group)


def _is_attempt(value: Attempt, number: int, keys: set[str]) -> bool:
    """Whether what a journal says is the attempt of this number: with a text for all `keys`, or, refused, for none."""
    if value.number != number or any(type(getattr(value, name)) is not kind for name, kind in _ATTEMPT_TYPES.items()):
        return False
    is_whole = {*value.parts} == keys or (not value.parts and value.reason != "")
    return is_whole and all(isinstance(text, str) for text in value.parts.values())


def _judged(attempt: Attempt, verdict: Verdict) -> Attempt:
    facts = {**attempt.facts, **verdict.facts}
    return Attempt(attempt.number, attempt.seed, attempt.parts, verdict.reason, facts, attempt.tokens + verdict.tokens)


def _duplicate(twin: tuple[str, float]) -> Verdict:
    return Verdict("near duplicate", {"duplicate_of": twin[0], "jaccard": round(twin[1], 4)})


def _source_of(number: int) -> str:
    return f"attempt {number}"
