"""What a GGUF file's tokenizer is made of, in llama.cpp's numbers and names: kinds of tokens, and rules that cut words.

`tokenizer.ggml.pre` names such a rule where tokenizer.json spells it out. The names are llama.cpp's, the rules those of
the models they are named after.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from ...text.ranks import CL100K_WORDS


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# English endings, letters with one sign before them, digits, signs with the line ends after them, white space.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same, but a word ends where its small letters end, and keeps its English ending.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The step of a tokenizer.json that spells text as bytes, after GPT-2's words if it cuts at all."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _words(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, byte_level(False))


_GPT2 = byte_level(True)
_SINGLE_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)

# tokenizer.ggml.pre -> how text is cut into words. Phi-4 says "dbrx", Phi-4-mini "gpt-4o".
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _words(_LLAMA3),
    "dbrx": _words(_LLAMA3),
    "smaug-bpe": _words(_LLAMA3),
    "gpt-4o": _words(_O200K),
}
# Words that are tokens as they stand are not built by merges; and a prompt begins with BOS unless the file says no.
WHOLE_WORDS = {"llama-bpe"}
# Where the vocabulary has marks in the words of their letters, and llama.cpp ends a word before one.
CUT_AT_MARKS = {"gpt-4o"}


def rule_name(pre_tokenizer: Mapping[str, Any] | None, *, whole_words: bool) -> str | None:
    """The name of a tokenizer.json's rule, None if llama.cpp has none for it.

    `whole_words`: whether words that are tokens as they stand are not built by merges (`ignore_merges`).
    """
    steps = _steps_of(pre_tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        if steps == _steps_of(known) and (name in WHOLE_WORDS) == whole_words:
            return name
    return None


def _steps_of(description: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """A pre-tokenizer's steps without what changes nothing: two ways to say that a pattern is what is kept."""
    steps: list[tuple[Any, ...]] = []
    for step in (description or {}).get("pretokenizers") or [description or {}]:
        kept = (step.get("behavior"), step.get("invert", False)) in (("Isolated", False), ("Removed", True))
        if step.get("type") == "Split" and kept:
            pattern = step.get("pattern", {}).get("Regex")
            steps.append(("words", _LLAMA3 if pattern == CL100K_WORDS else pattern))
        elif step.get("type") == "Digits":
            steps.append(("digits", step.get("individual_digits", False)))
        elif step.get("type") == "ByteLevel":
            steps.append(("bytes", step.get("use_regex", True), step.get("add_prefix_space", True)))
        else:
            steps.append(("unknown", step.get("type")))
    return steps
