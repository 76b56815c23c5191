"""Whether drafts pay: how often guesses hold, and what they and verifying them cost, measured while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

_FADING = 0.8  # weight of the past in the running averages
_UNTIMED = 4  # tokens of a draft at most until one was timed
TRUST = 0.7  # the share of guesses believed to hold before any was tried


@dataclass
class StepTimes:
    """What steps of a run take, whoever drafts.

    `plain`: seconds of a step of one token. `extra`: what each further token adds, in plain steps. None: not timed yet.
    """

    plain: float | None = None
    extra: float | None = None

    def saw_plain(self, seconds: float) -> None:
        """A step of one token took `seconds`."""
        self.plain = faded(self.plain, seconds)

    def saw_verifying(self, drafted: int, seconds: float) -> None:
        """A step that verified `drafted` tokens took `seconds`."""
        if self.plain:
            self.extra = faded(self.extra, max(0.0, seconds / self.plain - 1) / drafted)


class Payoff:
    """Of one source of drafts, with `most` tokens each at most: how long a draft should be, and what it would gain.

    Tell it the outcome of each (`saw_draft`). `times` is shared by all sources of a run.
    """

    retrying = 0.2  # how much of its trust a source regains with each draft that was not made

    def __init__(self, most: int, times: StepTimes | None = None):
        self.most = most
        self.times = StepTimes() if times is None else times
        self.guessing: float | None = None  # what a guess costs, in plain steps; None: not timed yet
        self._holding = TRUST

    def saw_draft(self, drafted: int, accepted: int, seconds: float) -> None:
        """A step that took `seconds` verified `drafted` tokens, `accepted` of them right."""
        tried = min(accepted + 1, drafted)  # those behind the first wrong one were not judged
        weight = _FADING**tried
        self._holding = weight * self._holding + (1 - weight) * accepted / tried
        self.times.saw_verifying(drafted, seconds)

    def length(self, most: int) -> int:
        """The draft length with the most tokens a second, `most` at most; 0 if a plain step is as good."""
        most = min(most, self.most)
        if self.times.plain is None and self._holding < TRUST / 2:
            return 0  # nothing to compare with yet, and guesses fail: time a plain step
        if self.times.extra is None or self.guessing is None:
            most = min(most, _UNTIMED)
        best = max(range(most + 1), key=self.rate)
        if not best:
            # One guess now and then, or times that change would never be noticed.
            self._holding += self.retrying * (TRUST / 2 - self._holding)
        return best

    def rate(self, drafted: int) -> float:
        """Tokens in the time of a plain step, estimated, if `drafted` are guessed; 1 for none.

        Of k guesses that each hold with probability p, p + ... + p^k are expected to; the step draws one more token.
        """
        hold = min(max(self._holding, 0.02), 0.98)
        expected = (1 - hold ** (drafted + 1)) / (1 - hold)
        return expected / (1 + drafted * ((self.times.extra or 0.0) + (self.guessing or 0.0)))


def faded(old: float | None, new: float) -> float:
    """The running average of what was `old` before `new` came."""
    return new if old is None else _FADING * old + (1 - _FADING) * new
