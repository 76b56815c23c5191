"""Prompt lookup: guess the next tokens from where the last few stood before, and let the model verify them at once.

After Saxena's prompt lookup decoding (2023). The guesses cost nothing, but verifying them does: see `payoff`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .payoff import Payoff, StepTimes

MAX_DRAFT = 16
_NGRAM = 3  # tokens that must agree before a continuation is believed
_CANDIDATES = 8  # latest places looked at
_LONGEST = 16  # an agreement longer than this tells no more


class LookupDrafter(Payoff):
    """What was read and said so far, and the drafts made from it.

    `most`: tokens a draft has at most. Tell it every token (`add`); `draft()` is empty where nothing agrees or where it
    would not pay.
    """

    def __init__(self, ids: Iterable[int], most: int = MAX_DRAFT, times: StepTimes | None = None):
        super().__init__(most, times)
        self.guessing = 0.0
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions after it, oldest first
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
        return ids[best : best + self.length(most)]


def accepted_of(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the draft's first tokens are what was drawn in their places."""
    return next((i for i, (guess, token) in enumerate(zip(draft, drawn, strict=False)) if guess != token), len(draft))
