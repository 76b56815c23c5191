"""Tokens coloured by a value, as HTML: what a notebook shows of an object is its `_repr_html_`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..values import token_ids

if TYPE_CHECKING:
    from ..text.vocabulary import Tokenizer

_BELOW, _ABOVE = (200, 85, 61), (42, 111, 151)  # of values below 0, and above
_CELL_STYLE = "padding:1px 4px;white-space:pre;color:black;"
_TOKEN_STYLE = "color:black;border-radius:2px;"


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token's text by itself, its space before it too; control tokens by their names."""
    return [_text_of(tokenizer, token) for token in ids]


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    if 0 <= token < tokenizer.vocab_size:
        data = tokenizer.token_bytes(token)
        return data.decode("utf-8", errors="replace") if data else tokenizer.id_to_token(token) or ""
    return ""


class ColouredTokens:
    """A text, each token coloured by its value: make it with `colour_tokens`."""

    def __init__(self, tokens: Sequence[str], values: np.ndarray):
        self._tokens, self._values = tokens, values

    def __repr__(self) -> str:
        return "\n".join(f"{value:10.3f}  {token!r}" for token, value in zip(self._tokens, self._values, strict=True))

    def _repr_html_(self) -> str:
        largest = _largest(self._values)
        spans = [_span(token, value, largest) for token, value in zip(self._tokens, self._values, strict=True)]
        return f'<div style="line-height:1.7">{"".join(spans)}</div>'


class TokenTable:
    """Tokens (rows, columns), each cell coloured by its value; `rows` and `columns` name them."""

    def __init__(
        self,
        cells: Sequence[Sequence[str]],
        values: mx.array | np.ndarray,
        *,
        rows: Sequence[object],
        columns: Sequence[object],
    ):
        self._cells, self._values = cells, numbers_of_array(values)
        self._rows, self._columns = rows, columns

    def __repr__(self) -> str:
        lines = [["", *map(str, self._columns)]]
        lines += [[str(row), *map(repr, cells)] for row, cells in zip(self._rows, self._cells, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines
        )

    def _repr_html_(self) -> str:
        largest = _largest(self._values)
        head = "".join(f"<th>{html.escape(str(column))}</th>" for column in ["", *self._columns])
        lines = [f"<tr>{head}</tr>"]
        for row, cells, values in zip(self._rows, self._cells, self._values, strict=True):
            shown = "".join(_cell(text, value, largest) for text, value in zip(cells, values, strict=True))
            lines.append(f"<tr><th>{html.escape(str(row))}</th>{shown}</tr>")
        return f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>'


def colour_tokens(
    tokenizer: Tokenizer, ids: Sequence[int] | mx.array, values: Sequence[float] | np.ndarray | mx.array
) -> ColouredTokens:
    """A text whose tokens are coloured by a value each: blue above 0, red below; the largest of them is full.

    `ids` and `values` have one length. A notebook shows the result; as text it is a token and its value a line. Raises
    OptionError where they differ in length, or a value is not finite.
    """
    tokens, numbers = token_ids(ids), numbers_of_array(values)
    if tokens is None or numbers.shape != (len(tokens),):
        raise OptionError(f"values have shape {numbers.shape}; give a number for each token id, of one text")
    if not np.isfinite(numbers).all():
        raise OptionError("values has one that is not finite, which has no colour")
    return ColouredTokens(token_texts(tokenizer, tokens), numbers)


def numbers_of_array(values: object) -> np.ndarray:
    """Values as numpy's, which knows no bfloat16."""
    return np.array(values.astype(mx.float32) if isinstance(values, mx.array) else values, dtype=np.float64)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0)) or 1.0


def _colour(value: float, largest: float) -> str:
    red, green, blue = _ABOVE if value >= 0 else _BELOW
    return f"background:rgba({red},{green},{blue},{0.75 * abs(value) / largest:.3f});"


def _span(token: str, value: float, largest: float) -> str:
    text = html.escape(token).replace("\n", "&#8629;<br>")
    return f'<span title="{value:.4g}" style="{_TOKEN_STYLE}{_colour(value, largest)}">{text}</span>'


def _cell(token: str, value: float, largest: float) -> str:
    text = html.escape(token).replace("\n", "&#8629;")
    return f'<td title="{value:.4g}" style="{_CELL_STYLE}{_colour(value, largest)}">{text}</td>'
