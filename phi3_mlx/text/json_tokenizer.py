"""A vocabulary as `tokenizer.json` has it, in the hands of the `tokenizers` library."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..files import read_text
from .added_tokens import AddedToken
from .streaming import ByteStream, StreamDecoder, symbols_to_bytes
from .vocabulary import Tokenizer, one_line, require_ids, require_unicode


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
            raise TokenizerError(f"{path} is not a readable tokenizer.json: {one_line(error)}") from None
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
            require_unicode(text)
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
            raise TokenizerError(f"tokenizer.json contradicts itself: {one_line(error)}") from None
        made.encode_special_tokens = True  # as text, that is
        return made

    def frame(self) -> list[int]:
        """The ids that the file's own post-processor puts around a text; `encode` leaves them out."""
        return _encoded(self._full, "", framed=True)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        known = [token_id for token_id in require_ids(ids) if 0 <= token_id < 2**32]
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
        raise TokenizerError(f"tokenizer.json cannot encode this text: {one_line(error)}") from None
    return ids
