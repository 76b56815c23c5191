"""The tasks: a text of any number of units, what is asked of it, how the answer begins, and what it must have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from random import Random
from typing import NamedTuple

from . import material

_DEPTHS = 40  # places of a needle, evenly from the first sentence to the last
_HOPS = 4
_COMMON_WORDS, _COMMON_TIMES, _OTHER_TIMES = 10, 30, 3  # words of cwe, and how often each stands there
_FEW_COMMON_TIMES, _FEW_OTHER_TIMES = 6, 1  # of a text below 4,096 tokens
_MANY = 4096
_ZETA = 2.0
_ASKED_RANKS = 3  # of fwe, behind the first


class Needle(NamedTuple):
    """A sentence that stands in the haystack at a depth, from 0 (its beginning) to 1."""

    sentence: str
    depth: float


@dataclass(frozen=True)
class Puzzle:
    """A text to be read, with a question. `units` says how its haystack is made: `hay(n)` has n sentences or parts.

    The text of a prompt is `before`, the haystack with its needles, and `after`; `prefix` is how the answer begins. A
    right answer has all `references`, or with `any_of` one of them. It has `max_tokens` tokens at most. Where another
    asks about the same haystack, `sized_by` is that whose question is longest: both have as much of it.
    """

    before: str
    hay: Callable[[int], list[str]]
    needles: tuple[Needle, ...]
    after: str
    prefix: str
    references: tuple[str, ...]
    max_tokens: int
    any_of: bool = False
    joint: str = " "
    least: int = 0
    sized_by: Puzzle | None = None

    def score(self, answer: str) -> float:
        """The share of references that stand in an answer, whatever their case; with `any_of` 1 for one of them."""
        told = answer.lower()
        found_in = [reference.lower() in told for reference in self.references]
        return float(any(found_in)) if self.any_of else sum(found_in) / len(found_in)


class Seeds(NamedTuple):
    """What a sample is made from. Tasks of one family and haystack get the same text, which is read once."""

    seed: int
    length: int
    number: int

    def rng(self, purpose: str) -> Random:
        return Random(f"{self.seed} {self.length} {self.number} {purpose}")  # a text's hash is the same everywhere


Haystack = Callable[[Random], Iterator[str]]


@dataclass(frozen=True)
class _Niah:
    """Needles in a haystack: `hay` is noise, essay or needles, `kind` and `value` say what is hidden."""

    hay: str
    family: str
    kind: str = "number"
    value: Callable[[Random], str] = material.digits
    key: Callable[[Random], Iterator[str]] = material.keys
    keys: int = 1
    values: int = 1
    asked: int = 1

    def make(self, seeds: Seeds, essay: Haystack) -> Puzzle:
        puzzle = self._make(seeds, essay)
        if self.keys > self.asked:
            return replace(puzzle, sized_by=replace(self, asked=self.keys)._make(seeds, essay))
        return puzzle

    def _make(self, seeds: Seeds, essay: Haystack) -> Puzzle:
        rng = seeds.rng(self.family)
        names = self.key(rng)
        hidden = [(next(names), [self.value(rng) for _ in range(self.values)]) for _ in range(self.keys)]
        needles = [self._sentence(name, value) for name, several in hidden for value in several]
        asked = hidden[: self.asked]
        rng.shuffle(needles)
        depths = sorted(rng.sample(range(_DEPTHS), len(needles)))
        # The question is drawn last and apart: tasks of one family have the same needles at the same depths.
        placed = tuple(Needle(s, place / (_DEPTHS - 1)) for s, place in zip(needles, depths, strict=True))
        several = self.values * self.asked > 1
        subject = " and of the ".join(name for name, _ in asked)
        what = f"{'all the secret' if several else 'the secret'} {self.kind}{'s' if several else ''} of the {subject}"
        return Puzzle(
            "Read this text.",
            self._haystack(seeds, essay, names, rng),
            placed,
            f"What {'are' if several else 'is'} {what}?",
            f"The secret {self.kind}{'s' if several else ''} of the {subject} {'are' if several else 'is'}",
            tuple(value for _, values in asked for value in values),
            128,
        )

    def _sentence(self, name: str, value: str) -> str:
        return f"The secret {self.kind} of the {name} is {value}."

    def _haystack(self, seeds: Seeds, essay: Haystack, names: Iterator[str], rng: Random) -> Callable[[int], list[str]]:
        if self.hay == "noise":
            return lambda n: list(islice(material.repeated(material.NOISE), n))
        if self.hay == "essay":
            return lambda n: list(islice(essay(seeds.rng("essay")), n))
        made: list[str] = []  # other needles

        def needles(n: int) -> list[str]:
            made.extend(self._sentence(next(names), self.value(rng)) for _ in range(n - len(made)))
            return made[:n]

        return needles


def _uuids(rng: Random) -> Iterator[str]:
    while True:
        yield material.uuid(rng)


def _animals(rng: Random) -> Iterator[str]:
    return iter(material.animals(rng))


def _thing(rng: Random) -> str:
    return material.things(rng, 1)[0]


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}."] + [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]


def _variables(seeds: Seeds, essay: Haystack) -> Puzzle:
    rng = seeds.rng("vt")
    names = material.variables(rng, 2 * (_HOPS + 1))
    shown, hidden = names[: _HOPS + 1], names[_HOPS + 1 :]
    values = rng.sample(range(10**4, 10**5), 2)
    shown_chain = _chain(shown, str(values[0]))
    example = " ".join(f"{link} {noise}" for link, noise in zip(shown_chain, material.NOISE, strict=True))
    depths = sorted(rng.sample(range(_DEPTHS), _HOPS + 1))
    question = "Which variables have the value {}? There are five."
    begin = "The variables with the value {} are"
    return Puzzle(
        f"Read this text. {example}\n{question.format(values[0])}\n{begin.format(values[0])} {', '.join(shown)}.\n\n"
        "Read this text.",
        lambda n: list(islice(material.repeated(material.NOISE), n)),
        tuple(
            Needle(sentence, depth / (_DEPTHS - 1))
            for sentence, depth in zip(_chain(hidden, str(values[1])), depths, strict=True)
        ),
        question.format(values[1]),
        begin.format(values[1]),
        tuple(hidden),
        30,
    )


def _listed(texts: Sequence[str]) -> list[str]:
    return [f"{number}. {text}" for number, text in enumerate(texts, 1)]


def _common_words(seeds: Seeds, essay: Haystack) -> Puzzle:
    rng = seeds.rng("cwe")
    times, others = (_COMMON_TIMES, _OTHER_TIMES) if seeds.length >= _MANY else (_FEW_COMMON_TIMES, _FEW_OTHER_TIMES)
    common = material.made_up(rng, _COMMON_WORDS, syllables=2)
    shown = material.made_up(rng, 2 * _COMMON_WORDS, syllables=2)
    example = shown[:_COMMON_WORDS] * 4 + shown[_COMMON_WORDS:]
    rng.shuffle(example)
    question = f"What are the {_COMMON_WORDS} most common words in this list?"
    begin = f"The {_COMMON_WORDS} most common words are"

    def hay(n: int) -> list[str]:
        """The common words, and n others, of which none has one of those within it."""
        draws = seeds.rng("cwe words")
        rare = [word for word in material.made_up(draws, n) if not any(text in word for text in common)]
        texts = common * times + rare * others
        draws.shuffle(texts)
        return _listed(texts)

    return Puzzle(
        f"Read this list. {' '.join(_listed(example))}\n{question}\n{begin} {', '.join(shown[:_COMMON_WORDS])}.\n\n"
        "Read this list.",
        hay,
        (),
        question,
        begin,
        tuple(common),
        120,
    )


def _frequent_codes(seeds: Seeds, essay: Haystack) -> Puzzle:
    rng = seeds.rng("fwe")
    first = _ASKED_RANKS + 1

    def counts(n: int) -> list[int]:
        """How often each rank stands among about n words."""
        all_of = sum(rank**-_ZETA for rank in range(1, n + 1))
        shares = (round(n * rank**-_ZETA / all_of) for rank in range(1, n + 1))
        return [count for count in shares if count]

    names = material.codes(rng, first)

    def hay(n: int) -> list[str]:
        draws = seeds.rng("fwe words")
        several = counts(max(n, 1))
        others = material.codes(draws, max(len(several) - first, 0) + first)
        ranked = ["...", *names[1:first], *(code for code in others if code not in names)]
        texts = [word for word, count in zip(ranked, several, strict=False) for _ in range(count)]
        draws.shuffle(texts)
        return texts

    return Puzzle(
        "Read this text of coded words; ignore the dots.",
        hay,
        (),
        f"What are the {_ASKED_RANKS} coded words that stand there most often?",
        f"The {_ASKED_RANKS} most frequent coded words are",
        tuple(names[1:first]),
        50,
        least=math.ceil(25 * _ZETA),  # so that the ranks that are asked for differ
    )


def _documents(hops: int) -> Callable[[Seeds, Haystack], Puzzle]:
    def make(seeds: Seeds, essay: Haystack) -> Puzzle:
        rng = seeds.rng("qa")
        name = _person(rng)
        town, region = (word.capitalize() for word in material.made_up(rng, 2, syllables=4))
        goods = material.things(rng, 2)

        def facts(person: str, place: str, where: str, draws: Random) -> list[str]:
            return [
                f"{person} was born in {place} and made a {draws.choice(goods)} there.",
                f"The town of {place} lies in the region of {where}.",
            ]

        gold = facts(name, town, region, rng)
        depths = sorted(rng.sample(range(_DEPTHS), 2))
        asked, begin, answer = f"Where was {name} born?", f"{name} was born in", town
        if hops == 2:
            asked = f"In which region does the town lie in which {name} was born?"
            begin, answer = f"The town where {name} was born lies in the region of", region

        def hay(n: int) -> list[str]:
            draws = seeds.rng("qa documents")
            texts: list[str] = []
            while len(texts) < n:
                place, where = (word.capitalize() for word in material.made_up(draws, 2, syllables=4))
                texts += facts(_person(draws), place, where, draws)
            return texts[:n]

        return Puzzle(
            "Read these documents.",
            hay,
            tuple(Needle(text, depth / (_DEPTHS - 1)) for text, depth in zip(gold, depths, strict=True)),
            asked,
            begin,
            (answer,),
            32,
            any_of=True,
            joint="\n",
            sized_by=None if hops == 2 else _documents(2)(seeds, essay),
        )

    return make


def _person(rng: Random) -> str:
    first, last = material.made_up(rng, 2)
    return f"{first.capitalize()} {last.capitalize()}"


_FOUR_KEYS = "four keys"
RULER_TASKS: dict[str, Callable[[Seeds, Haystack], Puzzle]] = {
    "niah_single_1": _Niah("noise", "single 1").make,
    "niah_single_2": _Niah("essay", "single 2").make,
    "niah_single_3": _Niah("essay", "single 3", "code", material.uuid).make,
    "niah_multikey_1": _Niah("essay", _FOUR_KEYS, keys=4).make,
    "niah_multikey_2": _Niah("needles", "multikey 2").make,
    "niah_multikey_3": _Niah("needles", "multikey 3", "code", material.uuid, _uuids).make,
    "niah_multivalue": _Niah("essay", "multivalue", values=4).make,
    "niah_multiquery": _Niah("essay", _FOUR_KEYS, keys=4, asked=4).make,
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_codes,
    "qa_1": _documents(1),
    "qa_2": _documents(2),
}
EASIEST = "niah_word"  # none of RULER's: a plain word to be found, for small models
_EXTRA = {EASIEST: _Niah("essay", "word", "word", _thing, _animals).make}
ALL_TASKS = RULER_TASKS | _EXTRA
