"""The `Tokenizer` interface and the three vocabularies behind it: `tokenizer.json`, SentencePiece, tiktoken ranks.

The reference is the shipped `tokenizer.json` as the `tokenizers` library reads it. What it does with an added token
(`<|user|>` and its like) is what `Tokenizer` does for every backend: the longest string at the leftmost place wins, a
token with `rstrip` swallows the white space after it, and each stretch of text between added tokens is encoded for
itself, so in a SentencePiece vocabulary each one gets its own leading `▁`. Which of them a text may write is the
rule of `added_tokens`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import PromptError, TokenizerError
from ..files import read_bytes, read_text
from ..values import shown, token_ids
from .added_tokens import AddedToken, AddedTokens, Writer
from .pieces import CONTROL, UNKNOWN, USER_DEFINED, piece_types, without_user_defined
from .ranks import CL100K_SIZE, CL100K_WORDS, phi3_small_tokens, read_ranks
from .streaming import ByteStream, PieceStream, StreamDecoder, symbols_to_bytes


class Tokenizer(ABC):
    """One vocabulary. `load_tokenizer` makes one and fills the attributes that come from the model's other files.

    Attributes:
        added_tokens: the added tokens by their strings.
        special_ids: ids that `decode` and `stream` leave out.
        vocab_size: one more than the highest id (the model's embedding may have more rows).
        stop_ids: ids that end a generation, see `load_tokenizer`.
        add_bos_token: whether a prompt begins with `bos_token_id`; `encode` itself never adds it.
        chat_template: the model's own Jinja template, None where its files have none.
        named_templates: its other ones by name, "tool_use" say.
        special_tokens: the tokens that a template knows by name, `bos_token` and the like.
    """

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
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
        """The added tokens that what `writer` says never turns into."""
        return self._not_the_assistants if writer == "assistant" else self._control

    def _written_by(self, *writers: Writer) -> AddedTokens:
        parts = {self.bos_token_id, self.eos_token_id, self.pad_token_id, *self.stop_ids}
        return AddedTokens(token for token in self.added_tokens.values() if token.writer(parts) in writers)

    # Made when they are first asked for: by then `load_tokenizer` has said which tokens play a part.

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
        """Ids of `text`. With `special`, strings like `<|end|>` in it become control tokens; without, never.

        Added words are tokens either way. Raises PromptError for what is no text, or has a lone surrogate, which no
        vocabulary can spell.
        """
        _require_unicode(text)
        return self.encode_pieces(self._all_added.cut(text) if special else [text])

    def split_special(self, text: str) -> list[str | int]:
        """Cut `text` at its control tokens: ids of those, and between them the ordinary text, never empty."""
        return self._control.cut(text)

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of what `split_special` gives: ids stay, and no string turns into a control token, whatever it holds."""
        ids: list[int] = []
        for n, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                _require_unicode(piece)
                ids += self._encode_text(piece, first=n == 0)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; ids that stand for nothing are passed over, broken UTF-8 becomes U+FFFD.

        Raises PromptError for what are no ids.
        """
        stream = self._stream(skip_special)
        return "".join([*map(stream.add, _require_ids(ids)), stream.finish()])

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one; what it returns joins to `decode` of them all."""
        return self._stream(skip_special=True)

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token given as the vocabulary spells it, or None."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id that stands for nothing."""

    @abstractmethod
    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        """Ids of ordinary text, added words in it included; `first` says that no token stands before it."""

    @abstractmethod
    def _stream(self, skip_special: bool) -> StreamDecoder: ...

    def _piece_stream(self, skip_special: bool, drop_first_space: bool = True) -> PieceStream:
        hidden = self.special_ids if skip_special else frozenset()
        return PieceStream(
            lambda token_id: None if token_id in hidden else self.id_to_token(token_id),
            drop_first_space=drop_first_space,
        )


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the `tokenizers` library.

    `declared`: added tokens of other files. As in transformers 5, those that the file lacks get the next free ids, and
    with `overrule` (tokenizer_config.json) the flags of the others hold instead of the file's own; what either calls
    special is special.
    """

    def __init__(self, path: Path, declared: Iterable[AddedToken] = (), *, overrule: bool = True):
        import tokenizers

        try:
            self._full = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a readable tokenizer.json: {_one_line(error)}") from None
        # Lengths are the caller's business: a file saved with truncation on would cut prompts silently.
        self._full.no_truncation()
        self._full.no_padding()
        self._decoder_steps = _steps(self._full.decoder)
        if not (self._is_byte_level or self._is_sentencepiece):
            kinds = ", ".join(step["type"] for step in self._decoder_steps) or "none"
            raise TokenizerError(f"{path} decodes with {kinds}; known are ByteLevel and SentencePiece's byte fallback")
        known = {token.content: token for token in self._full.get_added_tokens_decoder().values()}
        self._full.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=token.special or (token.content in known and known[token.content].special),
                )
                for token in declared
                if overrule or token.content not in known
            ]
        )
        super().__init__(
            self._full.get_vocab_size(with_added_tokens=False),
            [
                AddedToken(i, t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized)
                for i, t in self._full.get_added_tokens_decoder().items()
            ],
        )

    @property
    def _is_byte_level(self) -> bool:
        return [step["type"] for step in self._decoder_steps] == ["ByteLevel"]

    @property
    def _is_sentencepiece(self) -> bool:
        to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        steps = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
        return self._decoder_steps in (steps, [*steps, first_space])

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if special:
            _require_unicode(text)
            return _encoded(self._full, text)
        return super().encode(text)

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        # The library finds control tokens in any text, so text that contains one goes to a copy that does not.
        # That copy costs a second load; nearly every text is ordinary and never needs it.
        ordinary = not any(token.normalized for token in self._control) and not self._control.occur_in(text)
        if first:
            tokenizer = self._full if ordinary else self._plain
        else:
            tokenizer = self._full if ordinary and not self._prefixes_first_only else self._plain_inner
        return _encoded(tokenizer, text)

    @cached_property
    def _prefixes_first_only(self) -> bool:
        """Whether only text at the very beginning gets its `▁` (files that transformers 5 has saved again)."""
        return any(step.get("prepend_scheme") == "first" for step in _steps(self._full.pre_tokenizer))

    @cached_property
    def _plain(self) -> Any:
        return self._without_control(json.loads(self._full.to_str()))

    @cached_property
    def _plain_inner(self) -> Any:
        """`_plain` for text that follows a token."""
        if not self._prefixes_first_only:
            return self._plain
        description = json.loads(self._full.to_str())
        for step in _parts(description["pre_tokenizer"]):
            if step.get("prepend_scheme") == "first":
                step["prepend_scheme"] = "never"
        return self._without_control(description)

    def _without_control(self, description: dict[str, Any]) -> Any:
        """A tokenizer of the library for which control tokens are ordinary text."""
        import tokenizers

        control = {token.content for token in self._control}
        for token in description["added_tokens"]:
            token["special"] = token["content"] in control
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library takes some files that it would not write
            raise TokenizerError(f"tokenizer.json contradicts itself: {_one_line(error)}") from None
        made.encode_special_tokens = True  # as text, that is
        return made

    def frame(self) -> list[int]:
        """The ids that the file's own post-processor puts around a text; `encode` leaves them out."""
        return _encoded(self._full, "", framed=True)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        known = [token_id for token_id in _require_ids(ids) if 0 <= token_id < 2**32]
        return self._full.decode(known, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._full.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def _stream(self, skip_special: bool) -> StreamDecoder:
        if not self._is_byte_level:
            return self._piece_stream(skip_special, drop_first_space=self._decoder_steps[-1]["type"] == "Strip")
        hidden = self.special_ids if skip_special else frozenset()

        def to_bytes(token_id: int) -> bytes | None:
            token = None if token_id in hidden else self.id_to_token(token_id)
            return None if token is None else symbols_to_bytes(token)

        return ByteStream(to_bytes)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model` and the added tokens that other files declare."""

    def __init__(self, path: Path, added: Iterable[AddedToken]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(read_bytes(path))
            size = self._model.get_piece_size()
            self._model.id_to_piece(list(range(size)))  # ValueError for one that is no UTF-8
            proto = self._model.serialized_model_proto()
            kinds = piece_types(proto)
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            raise TokenizerError(f"{path} is not a readable SentencePiece model: {_one_line(error)}") from None
        if USER_DEFINED in kinds:  # found by us, like every added token; SentencePiece would find them in any text
            self._model.load_from_serialized_proto(without_user_defined(proto))
        by_id = {
            number: AddedToken(number, self._model.id_to_piece(number), special=kind != USER_DEFINED)
            for number, kind in enumerate(kinds)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }
        for token in added:
            if token.id < size and self._model.id_to_piece(token.id) != token.content:
                raise TokenizerError(
                    f"{path.parent} declares {token.content} as id {token.id}, but that id is "
                    f"{self._model.id_to_piece(token.id)!r} in {path.name}: the files are of different models"
                )
            by_id[token.id] = token
        super().__init__(size, by_id.values())
        self._size = size

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        pieces = self._words.cut(text)
        return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else self._model.encode(piece))]

    def token_to_id(self, token: str) -> int | None:
        if token in self.added_tokens:
            return self.added_tokens[token].id
        token_id = self._model.piece_to_id(token)  # the unknown token's id for what it does not know
        return token_id if self.id_to_token(token_id) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added_by_id:
            return self._added_by_id[token_id]
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._size else None

    def _stream(self, skip_special: bool) -> StreamDecoder:
        return self._piece_stream(skip_special)


class TiktokenTokenizer(Tokenizer):
    """tiktoken ranks (`cl100k_base.tiktoken`), as Phi-3-small has them, and its added tokens."""

    def __init__(self, path: Path, added: Iterable[AddedToken]):
        try:
            import tiktoken
        except ImportError:
            raise TokenizerError(
                f'{path} needs tiktoken, which is not installed: pip install "phi3-mlx[tiktoken]"'
            ) from None
        ranks = read_ranks(path)
        known = phi3_small_tokens() if len(ranks) == CL100K_SIZE else {}
        by_id = {number: AddedToken(number, content) for content, number in known.items()}
        declared = {token.id: token for token in added}
        if not known and not declared:
            raise TokenizerError(
                f"{path} has {len(ranks):,} ranks, cl100k_base has {CL100K_SIZE:,}: download it again, "
                "or declare its added tokens in tokenizer_config.json"
            )
        clash = next((token for token in declared.values() if token.id < len(ranks)), None)
        if clash:
            raise TokenizerError(f"{path.parent} declares {clash.content} as id {clash.id}, which {path.name} has too")
        elsewhere = {token.content for token in declared.values()}
        by_id = {number: token for number, token in by_id.items() if token.content not in elsewhere} | declared
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(path.stem, pat_str=CL100K_WORDS, mergeable_ranks=ranks, special_tokens={})
        self._bytes = list(ranks)  # in order of rank, which `_read_ranks` has checked
        super().__init__(len(ranks), by_id.values())

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        pieces = self._words.cut(text)
        return [i for p in pieces for i in ([p] if isinstance(p, int) else self._encoding.encode_ordinary(p))]

    def token_to_id(self, token: str) -> int | None:
        added = self.added_tokens.get(token)
        return added.id if added else self._ranks.get(token.encode("utf-8"))

    def id_to_token(self, token_id: int) -> str | None:
        spelled = self._to_bytes(token_id)
        return None if spelled is None else spelled.decode("utf-8", errors="replace")

    def _to_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added_by_id:
            return self._added_by_id[token_id].encode("utf-8")
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else None

    def _stream(self, skip_special: bool) -> StreamDecoder:
        hidden = self.special_ids if skip_special else frozenset()
        return ByteStream(lambda token_id: None if token_id in hidden else self._to_bytes(token_id))


def _steps(component: Any) -> list[dict[str, Any]]:
    """The settings of a `tokenizers` component, one dict a step; the library shows them only as pickled JSON."""
    return _parts(json.loads(component.__getstate__())) if component else []


def _parts(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a component as `tokenizer.json` describes it: those of a Sequence, or itself alone."""
    if description is None:
        return []
    return description.get("decoders") or description.get("pretokenizers") or [description]


def _encoded(tokenizer: Any, text: str, *, framed: bool = False) -> list[int]:
    """Ids that the library gives; TokenizerError for what its file lacks, a token for the unknown say."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=framed).ids
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.json cannot encode this text: {_one_line(error)}") from None
    return ids


def _require_ids(ids: Iterable[int]) -> list[int]:
    known = token_ids(ids)
    if known is None:
        raise PromptError(f"{shown(ids)} cannot be decoded; give a list of token ids")
    return known


def _require_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{shown(text)} cannot be encoded; give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start + 1}: "
            "that is no Unicode text; remove it"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
