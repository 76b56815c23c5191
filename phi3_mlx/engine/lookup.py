"""Prompt lookup: guess the next tokens from where the last few stood before, and let the model verify them at once.

After Saxena's prompt lookup decoding (2023). The guesses cost nothing; whether verifying k of them pays depends on how
often they hold and on what a step of k + 1 tokens costs on this device, so both are measured while the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_DRAFT = 16
_NGRAM = 3  # tokens that must agree before a continuation is believed
_CANDIDATES = 8  # latest places looked at
_LONGEST = 16  # an agreement longer than this tells no more
_FADING = 0.8  # weight of the past in the running averages
_UNTIMED = 4  # tokens of a draft at most until one was timed
_TRUST = 0.7  # the share of guesses believed to hold before any was tried


class Drafter:
    """What was read and said so far, and the drafts made from it.

    `most`: tokens a draft has at most. Tell it every token (`add`) and the outcome of every step (`saw_plain`,
    `saw_draft`); `draft()` is empty where nothing agrees or where it would not pay.
    """

    def __init__(self, ids: Iterable[int], most: int = MAX_DRAFT):
        self._most = most
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions after it, oldest first
        self._holding = _TRUST
        self._plain: float | None = None  # seconds of a step of one token
        self._extra: float | None = None  # seconds that each further token adds, of those of a plain step
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        self._ids.append(token)
        if len(self._ids) >= _NGRAM:
            self._places.setdefault(tuple(self._ids[-_NGRAM:]), []).append(len(self._ids))

    def draft(self, most: int) -> list[int]:
        """The likely next tokens, `most` at most."""
        ids = self._ids
        places = self._places.get(tuple(ids[-_NGRAM:]), [])[:-1]  # the last is here
        best, agreement = 0, 0
        for place in reversed(places[-_CANDIDATES:]):
            agreed = _NGRAM
            while agreed < min(_LONGEST, place) and ids[place - 1 - agreed] == ids[-1 - agreed]:
                agreed += 1
            if agreed > agreement:
                best, agreement = place, agreed
        if not agreement:
            return []
        return ids[best : best + self._length(min(most, self._most))]

    def saw_plain(self, seconds: float) -> None:
        """A step of one token took so long."""
        self._plain = _faded(self._plain, seconds)

    def saw_draft(self, drafted: int, accepted: int, seconds: float) -> None:
        """A step verified `drafted` tokens, `accepted` of them right."""
        tried = min(accepted + 1, drafted)  # those behind the first wrong one were not judged
        weight = _FADING**tried
        self._holding = weight * self._holding + (1 - weight) * accepted / tried
        if self._plain:
            self._extra = _faded(self._extra, max(0.0, seconds / self._plain - 1) / drafted)

    def _length(self, most: int) -> int:
        """The draft length with the most tokens a second, estimated; 0 if a plain step is as good.

        Of k guesses that each hold with probability p, (p - p^(k+1)) / (1 - p) are expected to.
        """
        extra = self._extra if self._extra is not None else 0.0
        hold = min(max(self._holding, 0.02), 0.98)
        if self._plain is None and hold < _TRUST / 2:
            return 0  # nothing to compare with yet, and guesses fail: time a plain step
        most = most if self._extra is not None else min(most, _UNTIMED)
        best, best_rate, expected, power = 0, 1.0, 1.0, 1.0
        for k in range(1, most + 1):
            power *= hold
            expected += power
            rate = expected / (1 + k * extra)
            if rate > best_rate:
                best, best_rate = k, rate
        if not best:
            # One guess now and then, or times that change would never be noticed.
            self._holding = _FADING * self._holding + (1 - _FADING) * _TRUST / 2
        return best


def _faded(old: float | None, new: float) -> float:
    return new if old is None else _FADING * old + (1 - _FADING) * new


def accepted_of(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the draft's first tokens are what was drawn in their places."""
    return next((i for i, (guess, token) in enumerate(zip(draft, drawn, strict=False)) if guess != token), len(draft))
