"""The vocabulary of a `tokenizer.json`, through the `tokenizers` library."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..files import read_text
from .added_tokens import AddedToken
from .streaming import ByteStream, StreamDecoder, symbols_to_bytes
from .vocabulary import MOST_IDS, Tokenizer, one_line, require_ids, require_unicode


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the `tokenizers` library.

    `declared`: added tokens of other files. As in transformers 5, those that the file lacks get the next free ids. With
    `overrule` (tokenizer_config.json) the flags of the others replace the file's own; a token is special if either says
    so.
    """

    def __init__(self, path: Path, declared: Iterable[AddedToken] = (), *, overrule: bool = True):
        import tokenizers

        try:
            self._full = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a readable tokenizer.json: {one_line(error)}") from None
        highest = max(self._full.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= MOST_IDS:
            raise TokenizerError(
                f"{path} has a token of id {highest:,}, expected below {MOST_IDS:,}; download it again"
            )
        # A file that was saved with truncation or padding would change prompts silently.
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
            highest + 1,
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
            require_unicode(text)
            return _encoded(self._full, text)
        return super().encode(text)

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        # The library finds control tokens in any text, so a text that contains one goes to a copy that finds none.
        # The copy costs a second load, which nearly no text needs.
        ordinary = not any(token.normalized for token in self._control) and not self._control.occur_in(text)
        if first:
            tokenizer = self._full if ordinary else self._plain
        else:
            tokenizer = self._full if ordinary and not self._prefixes_first_only else self._plain_inner
        return _encoded(tokenizer, text)

    @cached_property
    def _prefixes_first_only(self) -> bool:
        """Whether only the beginning of a text gets a `▁`, as in files that transformers 5 has saved."""
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
        except Exception as error:  # the library reads some files that it cannot read once it has saved them
            raise TokenizerError(f"tokenizer.json contradicts itself: {one_line(error)}") from None
        made.encode_special_tokens = True  # as text, that is
        return made

    def frame(self) -> list[int]:
        """The ids that the file's post-processor puts around a text; `encode` omits them."""
        return _encoded(self._full, "", framed=True)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        known = [token_id for token_id in require_ids(ids) if 0 <= token_id < 2**32]
        return self._full.decode(known, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._full.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    @property
    def drops_first_space(self) -> bool:
        return self._decoder_steps[-1]["type"] == "Strip"

    def token_bytes(self, token_id: int) -> bytes:
        if not self._is_byte_level:
            return self._piece_bytes(token_id)
        token = self.id_to_token(token_id)
        return b"" if token is None else symbols_to_bytes(token)

    def _stream(self, skip_special: bool) -> StreamDecoder:
        if not self._is_byte_level:
            return self._piece_stream(skip_special)
        hidden = self.special_ids if skip_special else frozenset()
        return ByteStream(lambda token_id: None if token_id in hidden else self.token_bytes(token_id))


def _steps(component: Any) -> list[dict[str, Any]]:
    """The settings of a `tokenizers` component, a dict for each step; the library gives them only as pickled JSON."""
    return _parts(json.loads(component.__getstate__())) if component else []


def _parts(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a component as `tokenizer.json` describes it: those of a `Sequence`, or the component itself."""
    if description is None:
        return []
    return description.get("decoders") or description.get("pretokenizers") or [description]


def _encoded(tokenizer: Any, text: str, *, framed: bool = False) -> list[int]:
    """The library's ids; TokenizerError if the file lacks something that the text needs, such as an unknown token."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=framed).ids
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.json cannot encode this text: {one_line(error)}") from None
    return ids
