"""A SentencePiece vocabulary, `tokenizer.model`."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import TokenizerError
from ..files import read_bytes
from .added_tokens import AddedToken
from .pieces import CONTROL, UNKNOWN, USER_DEFINED, piece_types, without_user_defined
from .streaming import StreamDecoder
from .vocabulary import Tokenizer, one_line


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
            raise TokenizerError(f"{path} is not a readable SentencePiece model: {one_line(error)}") from None
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

    @property
    def drops_first_space(self) -> bool:
        return True

    def token_bytes(self, token_id: int) -> bytes:
        return self._piece_bytes(token_id)

    def _stream(self, skip_special: bool) -> StreamDecoder:
        return self._piece_stream(skip_special)
