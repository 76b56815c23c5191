"""What haystacks are made of: noise, a text, names, numbers and codes; all from a seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random

_SENTENCE_WORDS = 20  # words of a sentence; a longer one is cut, so that a needle can stand near any depth

NOISE = (
    "The rain fell on the roof.",
    "The river ran past the mill.",
    "A cat slept by the door.",
    "The wind moved the leaves.",
    "We walked home in the dark.",
)
_ADJECTIVES = (
    "old young small large quiet loud brave shy quick slow warm cold bright dark round flat soft hard clean dusty "
    "happy sad clever simple gentle rough heavy light tall short early late golden silver wooden iron paper stone "
    "distant near rare common proud humble busy idle fresh dry wet thin thick sweet bitter calm wild tidy lucky "
    "curious patient honest steady hidden open empty full narrow wide broken smooth polite careful eager"
).split()
_NOUNS = (
    "owl fox bear frog duck hen goat sheep horse mouse otter badger lantern ribbon castle garden bridge ladder basket "
    "kettle candle mirror hammer pencil button bottle blanket carpet drawer window gate fence barn mill harbor island "
    "valley forest meadow river pond hill cave tower market bakery school library station workshop orchard village "
    "cabin tent wagon boat sail anchor compass map letter book drum flute bell clock coin key lock rope bucket shovel "
    "apple pear plum cherry"
).split()
_ANIMALS = 12  # the first of the nouns
_VERBS = (
    "watched carried found painted followed counted mended moved cleaned visited borrowed remembered passed opened "
    "closed lifted measured wrapped covered admired"
).split()
_WHEN = (
    "in the morning|after lunch|before dawn|late in the evening|in the first week of spring|on a cold day|while it "
    "rained|for the third time|without a word|with some help|long ago|near the end of the year"
).split("|")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def essay(rng: Random) -> Iterator[str]:
    """Simple sentences without end, each about another thing: the haystack where no text is given."""
    while True:
        first, second = rng.sample(_NOUNS, 2)
        yield (
            f"The {rng.choice(_ADJECTIVES)} {first} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {second} "
            f"{rng.choice(_WHEN)}."
        )


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in pieces of at most 20 words."""
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        parts = sentence.split()
        for first in range(0, len(parts), _SENTENCE_WORDS):
            sentences.append(" ".join(parts[first : first + _SENTENCE_WORDS]))
    return sentences


def repeated(sentences: Sequence[str], start: int = 0) -> Iterator[str]:
    """Sentences in turn, from one of them on, and again from the first."""
    place = start
    while True:
        yield sentences[place % len(sentences)]
        place += 1


def things(rng: Random, count: int) -> list[str]:
    return rng.sample(_NOUNS[_ANIMALS:], count)


def animals(rng: Random) -> list[str]:
    """All of them, in an order of their own."""
    return rng.sample(_NOUNS[:_ANIMALS], _ANIMALS)


def keys(rng: Random) -> Iterator[str]:
    """Names such as brave-owl, none twice; longer ones once there is no other."""
    pairs = [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    rng.shuffle(pairs)
    yield from pairs
    for adjective in _ADJECTIVES:
        yield from (f"{adjective}-{pair}" for pair in pairs if not pair.startswith(f"{adjective}-"))


def digits(rng: Random) -> str:
    """Seven digits."""
    return str(rng.randrange(10**6, 10**7))


def uuid(rng: Random) -> str:
    """A UUID of version 4."""
    hexadecimal = f"{rng.getrandbits(128):032x}"
    hexadecimal = f"{hexadecimal[:12]}4{hexadecimal[13:16]}{'89ab'[rng.randrange(4)]}{hexadecimal[17:]}"
    return "-".join((hexadecimal[:8], hexadecimal[8:12], hexadecimal[12:16], hexadecimal[16:20], hexadecimal[20:]))


def variables(rng: Random, count: int) -> list[str]:
    """Names of five capitals, none twice."""
    return _distinct(lambda: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)), count)


def codes(rng: Random, count: int) -> list[str]:
    """Words of six letters, none twice."""
    return _distinct(lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)), count)


def made_up(rng: Random, count: int, syllables: int = 3) -> list[str]:
    """Words that can be spoken and mean nothing, none twice."""
    return _distinct(lambda: "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)), count)


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made[make()] = None
    return list(made)
