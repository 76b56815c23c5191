"""The text that bits and weights are fitted to: a bundled one, a user's, or one that the source writes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import own_text
from .options import OWN_TEXT
from .sources import Source
from .texts import calibration, calibration_ids, shared_runs, tokenizer_of

_THE_SAME = 0.1  # of a text's runs of eight words, above which it counts as the one that was fitted to


class FittedText:
    """`given`: a text, "self" for one that `source` writes with `seed`, None for the bundled one.

    `ids`: its token ids, none of them before `make` where the source writes it; `tokens`: how many there will be.
    """

    def __init__(self, source: Source, given: str | None, seed: int | None):
        self._source, self._given, self._seed = source, given, seed or 0
        self._tokenizer = tokenizer_of(source)
        self.is_own = given == OWN_TEXT
        self.ids = [] if self.is_own else calibration_ids(self._tokenizer, given)
        self.tokens = own_text.OWN_TOKENS if self.is_own else len(self.ids)
        self._shares: dict[str, float] = {}  # of other texts, once they were asked for

    @property
    def asked(self) -> Sequence[str | int]:
        """Tells it apart from others, also before it is written."""
        return [OWN_TEXT, self._seed] if self.is_own else self.ids

    def make(self, folder: Path | None, *, force: bool, progress: Callable[[int, int], None] | None) -> None:
        """Let the source write it, if it is to, or take what it wrote in `folder`; see `write_own_text`."""
        if self.is_own:
            self.ids = own_text.write_own_text(
                self._source, self._tokenizer, self._seed, folder, force=force, progress=progress
            )
            self._shares = {}

    def shared(self, text: str) -> float:
        """The share of another text's runs of eight words that are in this one."""
        if text not in self._shares:
            ours = self._tokenizer.decode(self.ids) if self.is_own else self._given
            self._shares[text] = shared_runs(text, calibration() if ours is None else ours)
        return self._shares[text]

    def holds(self, text: str) -> bool:
        """Whether what is measured on another text would be measured on this one."""
        return text == self._given or self.shared(text) > _THE_SAME

    def about(self, evaluated: str | None) -> Mapping[str, Any]:
        """How a text of the source's own came about; `evaluated` is what the report reads, if there is one."""
        return own_text.about_own_text(
            self._tokenizer, self._seed, None if evaluated is None else self.shared(evaluated)
        )
