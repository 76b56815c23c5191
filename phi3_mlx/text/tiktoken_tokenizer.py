"""A vocabulary of tiktoken's ranks, Phi-3-small's."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import TokenizerError
from .added_tokens import AddedToken
from .ranks import CL100K_SIZE, CL100K_WORDS, phi3_small_tokens, read_ranks
from .streaming import ByteStream, StreamDecoder
from .vocabulary import Tokenizer


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
        self._bytes = list(ranks)  # in order of rank, which `read_ranks` has checked
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

    @property
    def drops_first_space(self) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return self._to_bytes(token_id) or b""

    def _stream(self, skip_special: bool) -> StreamDecoder:
        hidden = self.special_ids if skip_special else frozenset()
        return ByteStream(lambda token_id: None if token_id in hidden else self._to_bytes(token_id))
