"""Text from the user: from a file, from stdin, or typed."""

from __future__ import annotations

import os
import sys

from .. import files
from ..conversion.options import OWN_TEXT
from ..errors import PromptError


def read_input(path: str) -> str:
    """The text of a file, or of stdin for "-". PromptError names the file and what is wrong with it."""
    name = "stdin" if path == "-" else path or "''"
    try:
        data = files.read_up_to(sys.stdin.buffer) if path == "-" else files.read_bytes(path, streams=True)
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror}; give a readable text file") from error
    return decode_text(data, name)


def read_calibration(given: str) -> str:
    """The text of a file, or "self": the model writes one. A file of that name is ./self."""
    return given if given == OWN_TEXT else read_input(given)


def check_text(text: str, name: str) -> str:
    """`text`, or PromptError if it came from bytes that are not UTF-8 (Python keeps those as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        try:
            return os.fsencode(text).decode()  # UTF-8, which the locale does not say
        except UnicodeError:
            raise PromptError(f"{name} is not UTF-8 text (character {error.start + 1:,}); type it again") from error
    return text


def decode_text(data: bytes, name: str) -> str:
    """The text in the bytes of the file `name`; PromptError says where they are none, and what converts them."""
    try:
        return files.decode(data)
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} {files.not_unicode(error, data, name)}") from error
