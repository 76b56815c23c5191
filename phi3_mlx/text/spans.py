"""A rendered chat's ids, and which of them lie in spans of the text: what the model generated."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from ..errors import ChatError
from .tokenizer import Tokenizer

Span = tuple[int, int, int]  # first character, end, and the number of the assistant turn


def encode_spans(
    tokenizer: Tokenizer, guard: str, text: str, spans: Sequence[Span], *, whole: bool
) -> tuple[list[int], list[int]]:
    """The ids of a rendered text, and for each the turn of the span that it is in (0: in none).

    `guard` is left out of the ids. Unless the spans are `whole`, a token that ends answers belongs to the turn whose
    span is before it. Raises ChatError where the tokenizer finds a token that does not stand in the text.
    """
    encoding = _SpanEncoding(tokenizer, guard, text, spans, whole)
    for piece in tokenizer.split_special(text):
        encoding.add(piece)
    return encoding.ids, encoding.turns


class _SpanEncoding:
    """The ids and turns of a text's pieces so far."""

    def __init__(self, tokenizer: Tokenizer, guard: str, text: str, spans: Sequence[Span], whole: bool):
        self.ids: list[int] = []
        self.turns: list[int] = []
        self._tokenizer, self._guard, self._text, self._spans, self._whole = tokenizer, guard, text, spans, whole
        self._firsts = [first for first, _, _ in spans]
        self._ends = {end: turn for _, end, turn in spans}
        self._bounds = sorted({*self._firsts, *self._ends})
        self._position = 0  # in the text, behind the last piece
        self._ended: tuple[int, int] | None = None  # after an answer: the number of ids up to its end, and its turn

    def add(self, piece: int | str) -> None:
        """Encode the next piece: a control token's id, or text between two of them."""
        written = piece if isinstance(piece, str) else self._tokenizer.id_to_token(piece) or ""
        start = self._text.find(written, self._position)  # between them is white space that a token takes
        if start < 0:  # a normalized token may match text that is spelled differently
            raise ChatError(
                f"the tokenizer finds {written!r} in a chat where it does not stand, so no mask can be made; use the "
                "model's own tokenizer files"
            )
        bounds = self._bounds
        for place in bounds[bisect.bisect_left(bounds, self._position) : bisect.bisect_right(bounds, start)]:
            self._pass(place)
        self._position = start + len(written)
        if isinstance(piece, int):
            self._add_token(piece, start)
        else:
            self._add_text(piece, start)

    def _pass(self, place: int | None) -> None:
        """Note that the ids so far reach up to `place`, if a span ends there."""
        if place in self._ends:
            self._ended = len(self.turns), self._ends[place]

    def _add_token(self, token: int, start: int) -> None:
        turn = self._turn_at(start)
        if self._ended is not None and not self._whole and token in self._tokenizer.stop_ids:
            said, turn = self._ended
            self.turns[said:] = [turn] * (len(self.turns) - said)  # white space before it is generated too
        self.ids.append(token)
        self.turns.append(turn)
        self._ended = None

    def _add_text(self, piece: str, start: int) -> None:
        """Text that spans may begin and end in.

        In tokens a part begins where the text before it, encoded alone, stops having the same ids.
        """
        bounds = self._bounds
        cuts = bounds[bisect.bisect_right(bounds, start) : bisect.bisect_left(bounds, self._position)]
        new_ids, begun = self._encoded(piece), 0
        for first, end in zip([start, *cuts], [*cuts, None], strict=True):
            before = new_ids if end is None else self._encoded(self._text[start:end])
            upto = max(begun, _common(before, new_ids))
            self.turns += [self._turn_at(first)] * (upto - begun)
            begun = upto
            self._pass(end)
        self.ids += new_ids

    def _turn_at(self, place: int) -> int:
        """The turn of the span that a character is in, 0 for none."""
        n = bisect.bisect_right(self._firsts, place) - 1
        return self._spans[n][2] if n >= 0 and place < self._spans[n][1] else 0

    def _encoded(self, text: str) -> list[int]:
        """Ids of ordinary text that follows those so far, without the guard."""
        return encode_after(self._tokenizer, self.ids, text.replace(self._guard, ""))


def encode_after(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Ids of ordinary text that follows `ids`."""
    if not text:
        return []
    return tokenizer.encode_pieces([ids[-1], text])[1:] if ids else tokenizer.encode_pieces([text])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two lists of ids."""
    return next((n for n, (i, j) in enumerate(zip(a, b, strict=False)) if i != j), min(len(a), len(b)))
