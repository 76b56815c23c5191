"""Which tokens are meant: positions in a sequence, of its prompt or of its answer."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import OptionError
from ..models.hooks import Segment
from ..values import listed, plain, refusal, whole

_POSITIONS_SHOWN = 8  # positions that a message names

When = Literal["always", "prefill", "decode"]
Positions = int | Sequence[int] | slice | None
LayerIndexes = int | Iterable[int] | None
HeadIndexes = int | Iterable[int] | None


class Here(NamedTuple):
    """Where a value is: its layer, the rows of the trace, its positions, the how manieth these are of all meant, heads.

    `heads`: None for all.
    """

    layer: int | None
    rows: list[int]
    positions: list[int]
    ordinals: list[int]
    heads: list[int] | None


@dataclass(frozen=True)
class Tokens:
    """Tokens at `positions`, None for all, negative ones from the prompt's end; of the prompt or the answer alone.

    Raises OptionError for what are no positions.
    """

    positions: Positions = None
    when: When = "always"

    def __post_init__(self) -> None:
        if self.when not in ("always", "prefill", "decode"):
            raise refusal(self.when, "when", '"always", "prefill" or "decode"')
        if isinstance(self.positions, slice):
            for bound in (self.positions.start, self.positions.stop, self.positions.step):
                if bound is not None:
                    whole(bound, "positions")
            if (self.positions.step or 1) < 1:
                raise OptionError(f"positions {self.positions} go backwards; give a step of 1 or more")
        elif self.positions is not None:
            given = plain(self.positions)
            several = [given] if isinstance(given, int) else None
            if isinstance(given, Sequence) or hasattr(given, "tolist"):  # an array
                several = listed(given)
            if several is None:
                raise refusal(given, "positions", "whole numbers or a slice")
            object.__setattr__(self, "positions", tuple(whole(position, "positions") for position in several))

    @property
    def _listed(self) -> tuple[int, ...]:
        """The positions that were given one by one."""
        assert isinstance(self.positions, tuple)
        return self.positions

    @property
    def by_prompt(self) -> bool:
        """Whether it depends on where the prompt ends, which tokens are meant."""
        if self.when != "always":
            return True
        if isinstance(self.positions, slice):
            return (self.positions.start or 0) < 0 or (self.positions.stop or 0) < 0
        return self.positions is not None and any(position < 0 for position in self._listed)

    def among(self, segment: Segment) -> tuple[list[int], list[int]]:
        """The places in a segment's tokens that are meant, and the how manieth of all meant each of them is."""
        ordinal_of, places, ordinals = self._ordinals(segment.prompt), [], []
        for place in range(max(0, -segment.first), segment.length):
            position = segment.first + place
            if self.when != "always" and (position < segment.prompt) != (self.when == "prefill"):
                continue
            ordinal = ordinal_of(position)
            if ordinal is not None:
                places.append(place)
                ordinals.append(ordinal)
        return places, ordinals

    def _ordinals(self, prompt: int) -> Callable[[int], int | None]:
        """The how manieth of `positions` a position is, None if it is not among them."""
        if self.positions is None:
            first = prompt if self.when == "decode" else 0
            return lambda position: position - first
        if isinstance(self.positions, slice):
            start, stop = (
                None if bound is None else bound + prompt * (bound < 0)
                for bound in (self.positions.start, self.positions.stop)
            )
            first, step = max(start or 0, 0), self.positions.step or 1

            def in_slice(position: int) -> int | None:
                inside = position >= first and (stop is None or position < stop) and (position - first) % step == 0
                return (position - first) // step if inside else None

            return in_slice
        ordinals: dict[int, int] = {}
        for ordinal, position in enumerate(self._listed):
            ordinals.setdefault(position + prompt * (position < 0), ordinal)
        return ordinals.get

    @property
    def expects(self) -> bool:
        """Whether it names tokens that a sequence may lack."""
        if self.positions is None:
            return self.when != "always"
        return isinstance(self.positions, slice) or len(self._listed) > 0

    def lacking(self, there: Container[int], prompt: int) -> list[int]:
        """Which of the positions that were given one by one are not `there`; a slice takes what is there."""
        if self.positions is None or isinstance(self.positions, slice):
            return []
        return [position for position in self._listed if position + prompt * (position < 0) not in there]

    def __str__(self) -> str:
        """What a message says behind the name of what they are of, "" for all tokens."""
        at = "" if self.positions is None else f" at positions {self._shown}"
        return at + {"always": "", "prefill": " of prompts", "decode": " of answers"}[self.when]

    @property
    def _shown(self) -> str:
        if isinstance(self.positions, slice):
            return str(self.positions)
        shown = ", ".join(map(str, self._listed[:_POSITIONS_SHOWN]))
        return f"{shown}, ..." if len(self._listed) > _POSITIONS_SHOWN else shown

    def count(self, tokens: int) -> int:
        """How many of a sequence of `tokens` are meant at most."""
        if self.positions is None:
            return tokens
        if isinstance(self.positions, slice):
            return len(range(*self.positions.indices(tokens)))
        return min(len(self._listed), tokens)


class Arrivals:
    """Where tokens that are meant came, sequence by sequence, so that those that did not come can be told.

    `name`: what of a trace means them. `expects`: whether there may be some that do not come.
    """

    def __init__(self, name: str, tokens: Tokens):
        self._name, self._tokens, self.expects = name, tokens, tokens.expects
        self._came: dict[Hashable, set[int]] = {}  # positions, by sequence
        self._last: dict[Hashable, Segment] = {}  # what was read last of each sequence

    def begin(self, segment: Segment, cached: bool) -> None:
        """A pass reads a segment. Raises OptionError for positions that its sequence cannot come to have."""
        if segment.key not in self._came:
            if not cached:
                self._check(segment.length)
            elif segment.declared:
                self._check_prompt(segment.prompt)
            self._came[segment.key] = set()
        self._last[segment.key] = segment

    def note(self, segment: Segment, places: Sequence[int]) -> None:
        """These places of a segment came, which stand in their order."""
        if self.expects and segment.first + places[-1] not in self._came[segment.key]:  # else of another layer
            self._came[segment.key].update(segment.first + place for place in places)

    def forget(self, segment: Segment) -> None:
        """The tokens of a sequence from the segment's first on are gone."""
        if segment.key in self._came:
            last = self._last[segment.key]
            self._came[segment.key].difference_update(range(segment.first, last.first + last.length))

    def check_prompts(self, lengths: Sequence[int]) -> None:
        """OptionError for positions that prompts of these lengths, with no answers, do not have."""
        for length in lengths:
            self._check(length)
        prompts = [Segment(None, 1, 0, length, length) for length in lengths]
        if not any(self._tokens.among(prompt)[0] for prompt in prompts):
            raise OptionError(f"{self._name}{self._tokens}: a prompt of {max(lengths):,} tokens has no such token")

    def _check(self, length: int) -> None:
        """The same of one, and of positions that were given one by one."""
        lacking = [] if self._tokens.when == "decode" else self._tokens.lacking(range(length), length)
        if lacking:
            raise OptionError(
                f"position {lacking[0]} of {self._name} is outside a sequence of {length:,} tokens; "
                f"give {-length} to {length - 1}"
            )

    def _check_prompt(self, length: int) -> None:
        """OptionError for positions that no answer can bring."""
        for position in self._tokens.lacking(range(length), length):
            if position < 0 or self._tokens.when == "prefill":
                most = f"to {length - 1}" if self._tokens.when == "prefill" else "or more"
                raise OptionError(
                    f"position {position} of {self._name} is outside a prompt of {length:,} tokens; "
                    f"give {-length} {most}"
                )

    def missing(self) -> str:
        """What did not come, "" if all did."""
        lengths = [segment.first + segment.length for segment in self._last.values()]
        lacking = [self._tokens.lacking(came, self._last[key].prompt) for key, came in self._came.items()]
        if any(lacking):
            at = next(filter(None, lacking))[0]
            short = sum(map(bool, lacking))
            several = f"{short} of {len(lengths)} sequences"
            where = f"a sequence of {lengths[0]:,} tokens" if len(lengths) == 1 else several
            return f"position {at} of {self._name} was not among the tokens that were read, in {where}"
        if self._came and not any(self._came.values()):
            return f"{self._name}{self._tokens}: no such token was read"
        return ""
