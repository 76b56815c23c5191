"""The types of a SentencePiece model's pieces, which its file has and the library does not give.

The file is a protocol buffer (sentencepiece_model.proto); of its fields the pieces (1) and in them the type (3) are
read, nothing else.
"""

from collections.abc import Iterator

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
_NORMAL = 1

_PIECE_FIELD, _TYPE_FIELD = 1, 3  # field numbers
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # how a field is written


def piece_types(model: bytes) -> list[int]:
    """The type of each piece, in order of id."""
    return [model[at] if at else _NORMAL for at in _type_places(model)]


def without_user_defined(model: bytes) -> bytes:
    """The model with its user-defined pieces marked unused: encoding no longer finds them, and ids stay."""
    changed = bytearray(model)
    for at in _type_places(model):
        if at and changed[at] == USER_DEFINED:
            changed[at] = UNUSED
    return bytes(changed)


def _type_places(model: bytes) -> Iterator[int]:
    """For each piece, where its type is in the file; 0 where it has none."""
    for field, start, end in _fields(model, 0, len(model)):
        if field == _PIECE_FIELD:
            yield next((at for inner, at, _ in _fields(model, start, end) if inner == _TYPE_FIELD), 0)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, where its value starts, where it ends) of the fields of a message."""
    while at < end:
        tag, at = _varint(data, at)
        if tag & 7 == _VARINT:
            stop = _varint(data, at)[1]
        elif tag & 7 == _BYTES:
            size, at = _varint(data, at)
            stop = at + size
        else:
            stop = at + {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[tag & 7]
        yield tag >> 3, at, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number, where it ends)"""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at
