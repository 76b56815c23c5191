"""Token ids in, text out as soon as it is certain: never half a character, and joined exactly the full decode.

Two ways from tokens to text occur in the family. Byte-level vocabularies (Phi-3-small, Phi-4) spell every token
in bytes, so the text is one UTF-8 stream. SentencePiece vocabularies (Phi-3 mini, medium, 3.5) spell tokens in
text with `▁` for the space, and characters that they lack as runs of byte tokens `<0x..>`.
"""

import codecs
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class StreamDecoder(ABC):
    """Takes token ids one by one; the pieces of `add` and the last one of `finish` join to the full decode."""

    @abstractmethod
    def add(self, token_id: int) -> str:
        """Take one more token; return the text that no later token can change (often one token's, maybe none)."""

    @abstractmethod
    def finish(self) -> str:
        """Return the text held back; incomplete characters become U+FFFD. For the last token or a pause."""


class ByteStream(StreamDecoder):
    """Tokens that are bytes. `to_bytes` gives a token's bytes, or None where the token has no text."""

    def __init__(self, to_bytes: Callable[[int], bytes | None]):
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._to_bytes(token_id) or b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceStream(StreamDecoder):
    """Tokens that are SentencePiece pieces. `to_piece` gives a token's piece, or None where it has no text.

    A run of byte tokens is UTF-8 as a whole or not at all: one bad byte anywhere turns every byte of the run into
    U+FFFD (the rule of the `tokenizers` library). So a run is certain only when it has ended.
    """

    def __init__(self, to_piece: Callable[[int], str | None], *, drop_first_space: bool):
        self._to_piece = to_piece
        self._drop_space = drop_first_space
        self._run = bytearray()

    def add(self, token_id: int) -> str:
        piece = self._to_piece(token_id)
        if piece is None:
            return ""
        byte = fallback_byte(piece)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + piece.replace("▁", " "))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def fallback_byte(piece: str) -> int | None:
    """The byte that a SentencePiece byte token such as `<0x0A>` stands for, or None for any other piece."""
    match = _BYTE_TOKEN.fullmatch(piece)
    return int(match[1], 16) if match else None


def piece_to_bytes(piece: str) -> bytes:
    """What a SentencePiece piece adds to a text."""
    byte = fallback_byte(piece)
    return piece.replace("▁", " ").encode("utf-8") if byte is None else bytes([byte])


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """The alphabet of byte-level BPE: visible Latin-1 stands for its own byte, the others for U+0100 onwards."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


@functools.cache
def _symbol_of_byte() -> dict[int, str]:
    return {byte: symbol for symbol, byte in _byte_of_symbol().items()}


def bytes_to_symbols(token: bytes) -> str:
    """How byte-level BPE spells these bytes."""
    table = _symbol_of_byte()
    return "".join(table[byte] for byte in token)


def symbols_to_bytes(token: str) -> bytes:
    """A byte-level BPE token's bytes; a token outside that alphabet (an added one) is its own UTF-8."""
    table = _byte_of_symbol()
    try:
        return bytes(table[symbol] for symbol in token)
    except KeyError:
        return token.encode("utf-8")
