"""The `Tokenizer` interface. Its vocabularies have a file each: tokenizer.json, SentencePiece, tiktoken ranks.

The reference is the shipped `tokenizer.json` as the `tokenizers` library reads it. `Tokenizer` treats added tokens
(such as `<|user|>`) in the same way for every backend: the longest string at the leftmost place wins, a token with
`rstrip` takes the white space after it, and each piece of text between added tokens is encoded separately, so in a
SentencePiece vocabulary each piece gets its own leading `▁`. Which of them a text may write is the rule of
`added_tokens`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from ..errors import PromptError, TokenizerError
from ..values import shown, token_ids
from .added_tokens import AddedToken, AddedTokens, Writer
from .streaming import PieceStream, StreamDecoder, piece_to_bytes

# More than any vocabulary has. Lists of all ids stay small: of 2**32, those that the library `tokenizers` makes as it
# saves a tokenizer take 17 GB, and those of `spelling` as much.
MOST_IDS = 2**24


class Tokenizer(ABC):
    """A vocabulary. `read_tokenizer` makes one and sets the attributes that come from the model's other files.

    Attributes:
        added_tokens: the added tokens by their strings.
        special_ids: ids that `decode` and `stream` leave out.
        vocab_size: one more than the highest id (the model's embedding may have more rows).
        stop_ids: ids that end a generation, see `read_tokenizer`.
        add_bos_token: whether a prompt begins with `bos_token_id`; `encode` itself never adds it.
        chat_begins_with_bos: whether that holds for a chat too if its template writes none.
        chat_template: the model's Jinja template, None if its files have none.
        named_templates: its other templates by name, such as "tool_use".
        special_tokens: the tokens that a template knows by name, such as `bos_token`.
    """

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    chat_begins_with_bos: bool = True
    chat_template: str | None = None
    named_templates: Mapping[str, str] = {}
    special_tokens: Mapping[str, str] = {}
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, size: int, added: Iterable[AddedToken]):
        self.added_tokens: Mapping[str, AddedToken] = {token.content: token for token in added}
        if "" in self.added_tokens:
            raise TokenizerError("the tokenizer has an added token of no characters; download its files again")
        self.special_ids = frozenset(token.id for token in self.added_tokens.values() if token.special)
        self.vocab_size = max([size, *(token.id + 1 for token in self.added_tokens.values())])
        self._added_by_id = {token.id: token.content for token in self.added_tokens.values()}

    def kept_from(self, writer: Writer) -> AddedTokens:
        """The added tokens that the text of `writer` must not contain: there their strings are ordinary text."""
        return self._not_the_assistants if writer == "assistant" else self._control

    def _written_by(self, *writers: Writer) -> AddedTokens:
        roles = {self.bos_token_id, self.eos_token_id, self.pad_token_id, *self.stop_ids}
        return AddedTokens(token for token in self.added_tokens.values() if token.writer(roles) in writers)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: all but what is made at the first use, of which a pickle loses a part."""
        kind = type(self)
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(kind, name, None), cached_property)
        }

    # Made at the first use: by then `read_tokenizer` has set which tokens have a role.

    @cached_property
    def _all_added(self) -> AddedTokens:
        return AddedTokens(self.added_tokens.values())

    @cached_property
    def _words(self) -> AddedTokens:
        return self._written_by("anyone")

    @cached_property
    def _control(self) -> AddedTokens:
        return self._written_by("assistant", "template")

    @cached_property
    def _not_the_assistants(self) -> AddedTokens:
        return self._written_by("template")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. Strings like `<|end|>` in it become control tokens with `special`, and never without it.

        Added words are tokens either way. Raises PromptError for what is no text, and for a lone surrogate, which no
        vocabulary can encode.
        """
        require_unicode(text)
        return self.encode_pieces(self._all_added.cut(text) if special else [text])

    def split_special(self, text: str) -> list[str | int]:
        """Cut `text` at its control tokens: their ids, and between them the ordinary text, never empty."""
        return self._control.cut(text)

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of the pieces of `split_special`: ids stay, and no string becomes a control token."""
        ids: list[int] = []
        for n, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                require_unicode(piece)
                ids += self._encode_text(piece, first=n == 0)
        return ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids behind BOS, if there is one and it does not stand there already."""
        bos = self.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; unknown ids are skipped, and broken UTF-8 becomes U+FFFD.

        Raises PromptError if these are no ids.
        """
        stream = self._stream(skip_special)
        return "".join([*map(stream.add, require_ids(ids)), stream.finish()])

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one; its pieces joined are `decode` of all ids."""
        return self._stream(skip_special=True)

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token given as the vocabulary spells it, or None."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an unknown id."""

    @property
    @abstractmethod
    def drops_first_space(self) -> bool:
        """Whether a text that begins with a space is shown without it."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8, perhaps a part of a character; b"" for an unknown id."""

    @abstractmethod
    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        """Ids of ordinary text, with the added words in it; `first`: no token stands before it."""

    @abstractmethod
    def _stream(self, skip_special: bool) -> StreamDecoder: ...

    def _piece_stream(self, skip_special: bool) -> PieceStream:
        hidden = self.special_ids if skip_special else frozenset()
        return PieceStream(
            lambda token_id: None if token_id in hidden else self.id_to_token(token_id),
            drop_first_space=self.drops_first_space,
        )

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self.id_to_token(token_id)
        return b"" if piece is None else piece_to_bytes(piece)


def require_ids(ids: Iterable[int]) -> list[int]:
    known = token_ids(ids)
    if known is None:
        raise PromptError(f"{shown(ids)} cannot be decoded; give a list of token ids")
    return known


def require_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{shown(text)} cannot be encoded; give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start + 1}: "
            "that is no Unicode text; remove it"
        ) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
