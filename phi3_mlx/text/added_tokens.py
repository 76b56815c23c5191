"""Added tokens: strings that are one token wherever they stand in a text, and who may write them.

One rule says who, for every file that declares them. *Special* tokens are those that tokenizer.json,
tokenizer_config.json or a GGUF file (control and unknown types) call so, the control and unknown pieces of a
SentencePiece model but not its user-defined ones, and all of Phi-3-small's tiktoken names. *Marked* tokens have the
form `<|…|>`.

- A token that is neither is a **word** (`<think>`, a name that a fine-tune added): a token in every text, from every
  writer, as in transformers.
- A token that is one of the two (`<|tool_call|>` of Phi-4-mini, which its files do not call special; `<think>` if they
  do) is a token if the **assistant** says it, and ordinary text if anyone else does.
- A token that is both (`<|end|>`), or has a role (begins a text, ends an answer, pads, stands for the unknown), comes
  from the chat **template** alone, or from text that is sent as it is.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from typing import Literal

Writer = Literal["anyone", "assistant", "template"]

# Unicode's White_Space, which Rust's `\s` means; Python's has U+001C..U+001F as well.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_WHITE_AFTER = re.compile(f"[{_WHITE}]*")
_WORD_BEFORE, _WORD = re.compile(r"(?<=\w)"), re.compile(r"\w")

_MARKED = re.compile(r"<\|.+\|>", re.DOTALL)
_SENTENCEPIECE_ROLES = ("<unk>", "<s>", "</s>", "<pad>")  # tokens with a role, even if no file says so


@dataclass(frozen=True)
class AddedToken:
    """A token found in the text by its own string, before the vocabulary's rules apply."""

    id: int
    content: str
    special: bool = True  # `decode` leaves it out
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it
    single_word: bool = False  # no token inside a longer word
    normalized: bool = False  # looked for in the normalized text; only a tokenizer.json has the rules for that

    @property
    def marked(self) -> bool:
        return _MARKED.fullmatch(self.content) is not None

    def writer(self, roles: Collection[int | None]) -> Writer:
        """Who may write it. `roles` are the ids of the tokens with a role: bos, eos, pad and what ends answers."""
        if self.id in roles or self.content in _SENTENCEPIECE_ROLES or (self.special and self.marked):
            return "template"
        return "assistant" if self.special or self.marked else "anyone"


class AddedTokens:
    """Some of a vocabulary's added tokens, and their search in texts: the longest string at the leftmost place wins."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self._by_content = {token.content: token for token in tokens}
        self._longest = max(map(len, self._by_content), default=0)
        by_first: dict[str, list[str]] = {}
        for content in self._by_content:
            by_first.setdefault(content[0], []).append(content)
        self._lengths = {first: sorted({*map(len, contents)}, reverse=True) for first, contents in by_first.items()}
        self._first = re.compile("|".join(starmap(_first_of, by_first.items())) or "(?!)")

    def __iter__(self) -> Iterator[AddedToken]:
        return iter(self._by_content.values())

    def occur_in(self, text: str) -> bool:
        return any(self._at(text, match.start()) for match in self._first.finditer(text))

    def cut(self, text: str) -> list[str | int]:
        """The ids of the tokens in `text`, and between them the other text, never empty."""
        pieces: list[str | int] = []
        position = end = 0
        for match in self._first.finditer(text):
            begin = match.start()
            token = self._at(text, begin) if begin >= end else None
            if token is None:
                continue
            end = begin + len(token.content)
            if token.single_word and (_WORD_BEFORE.match(text, begin) or _WORD.match(text, end)):
                continue
            before = text[position:begin]
            if token.lstrip:
                before = before.rstrip(_WHITE)
            if before:
                pieces.append(before)
            pieces.append(token.id)
            position = end
            if token.rstrip and (white := _WHITE_AFTER.match(text, end)):
                position = white.end()
        if position < len(text):
            pieces.append(text[position:])
        return pieces

    def break_up(self, text: str, guard: str) -> str:
        """`text` with `guard` after the first character of every token in it, overlapping ones included.

        And at its end, before white space that may be stripped, where what it is joined with could complete one.
        """
        stripped = text.rstrip()
        broken = self._first.sub(
            lambda match: match[0] + guard * (self._at(stripped, match.start()) is not None), stripped
        )
        if self._unfinished(stripped):
            broken += guard
        return broken + text[len(stripped) :]

    def _unfinished(self, text: str) -> bool:
        """Whether it ends in the beginning of a token."""
        starts = (n for n in range(max(0, len(text) - self._longest), len(text)) if text[n] in self._lengths)
        ends = (text[start:] for start in starts)
        return any(len(end) < len(content) and content.startswith(end) for end in ends for content in self._by_content)

    def _at(self, text: str, begin: int) -> AddedToken | None:
        """The longest token that stands at this place, where one may begin."""
        contents = (text[begin : begin + length] for length in self._lengths[text[begin]])
        return next((self._by_content[content] for content in contents if content in self._by_content), None)


def _first_of(first: str, contents: Collection[str]) -> str:
    """A pattern for the first character of these strings, where the next one may be theirs too."""
    following = "".join({content[1] for content in contents if len(content) > 1})
    alone = first in contents
    return re.escape(first) + ("" if alone else f"(?=[{re.escape(following)}])")
