"""The name of a model in a GGUF file, by which llama.cpp decides what control tokens do to white space after them.

A GGUF file has no place for the tokens' strip flags. llama.cpp looks for "phi-3" or "phi3" in `general.name`: with it
every added token takes the white space after it, but for `<unk>`, `<s>` and `<|endoftext|>`; without it none does
(llama-vocab.cpp). So the name is chosen by what this tokenizer does with sample texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ChatError, OptionError
from ...text.chat import chat_text
from ...text.tokenizer import Tokenizer

_STRIPPING = re.compile("phi-?3", re.IGNORECASE)
_C_WHITE = " \t\n\v\f\r"  # what C's isspace means by white space
_KEEPING = ("<unk>", "<s>", "<|endoftext|>")
_LOOKED_UP = ("</s>", *_KEEPING)  # llama.cpp looks these up under such a name, and loads no file that lacks one
_TEXTS_SHOWN = 3  # texts that a message shows
_CHATS = (
    ["Hello!"],
    ["What is the capital of France?", "Paris.", "And of Italy?"],
    ["  Two spaces first, and a line end last.\n"],
    ["def f(x):\n    return x\n\nWhat does this do?", "It returns\n\n    x", "\tThanks!"],
    ["Grüße, 日本 😀", "", "\n\n- one\n- two"],
)


@dataclass(frozen=True)
class Naming:
    """The `name` for a file. `different`: those of `of_texts` sample texts that llama.cpp gives other ids.

    `notes` are sentences that the user should see.
    """

    name: str
    different: tuple[str, ...]
    of_texts: int
    notes: tuple[str, ...]


def choose_name(tokenizer: Tokenizer, usual: str, given: str | None = None) -> Naming:
    """The name under which llama.cpp's ids are this tokenizer's, made of the `usual` one; or the `given` one.

    Raises OptionError for a given name with which llama.cpp would not load the file.
    """
    texts = sample_texts(tokenizer)
    different = {strips: _different(tokenizer, texts, strips) for strips in _possible(tokenizer)}
    usual_strips = _strips(usual)
    best = min(different, key=lambda strips: (len(different[strips]), strips != usual_strips))
    name = usual if best == usual_strips else _renamed(usual, best)
    if given is not None:
        if _strips(given) not in different:
            missing = ", ".join(token for token in _LOOKED_UP if tokenizer.token_to_id(token) is None)
            raise OptionError(
                f"name {given!r} has {_STRIPPING.search(given)[0]!r} in it, for which llama.cpp looks up {missing}, "  # type: ignore[index]
                f"and this vocabulary has none; {name!r} would load"
            )
        name = given
    strips = _strips(name)
    notes = []
    if name != usual:
        how = "take" if strips else "keep"
        notes.append(f"general.name is {name!r}: by it llama.cpp lets control tokens {how} the white space after them")
    if len(different[strips]) > len(different[best]):
        notes.append(
            f"under that name llama.cpp gives other ids to {_counted(different[strips], texts)}; under "
            f"{_renamed(usual, best) if usual_strips != best else usual!r} to {len(different[best])}"
        )
    elif different[strips]:
        notes.append(f"under no name does llama.cpp give this tokenizer's ids to {_counted(different[strips], texts)}")
    return Naming(name, tuple(different[strips]), len(texts), tuple(notes))


def llama_cpp_ids(tokenizer: Tokenizer, text: str, *, strips: bool) -> list[int]:
    """The ids that llama.cpp gives a text, control tokens parsed: longest tokens first, whatever their flags."""
    fragments: list[str | int] = [text]
    for token in sorted(tokenizer.added_tokens.values(), key=lambda token: -len(token.content.encode())):
        takes = strips and token.content not in _KEEPING
        fragments = [part for piece in fragments for part in _cut(piece, token.content, token.id, takes)]
    return [i for piece in fragments for i in tokenizer.encode_pieces([piece])]


def sample_texts(tokenizer: Tokenizer) -> list[str]:
    """Conversations as the template writes them, and every added token before white space and behind it."""
    texts = []
    if tokenizer.chat_template is not None:
        for turns in _CHATS:
            roles = ("user", "assistant")
            messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(turns)]
            with suppress(ChatError):  # what this template does not write, nobody will ask
                texts.append(chat_text(tokenizer, messages))
    for content in tokenizer.added_tokens:
        texts += [f"{content}\nHello", f"Hello {content}  world", f"a{content}b{content}", f"\n{content}"]
    return texts


def _cut(piece: str | int, content: str, token_id: int, takes_white: bool) -> list[str | int]:
    if isinstance(piece, int):
        return [piece]
    parts: list[str | int] = []
    before, mark, after = piece.partition(content)
    while mark:
        parts += [before, token_id] if before else [token_id]
        before, mark, after = (after.lstrip(_C_WHITE) if takes_white else after).partition(content)
    return [*parts, before] if before else parts


def _possible(tokenizer: Tokenizer) -> tuple[bool, ...]:
    """Whether llama.cpp can be told to strip, and not to."""
    return (False, True) if all(tokenizer.token_to_id(token) is not None for token in _LOOKED_UP) else (False,)


def _different(tokenizer: Tokenizer, texts: Sequence[str], strips: bool) -> list[str]:
    return [
        text for text in texts if llama_cpp_ids(tokenizer, text, strips=strips) != tokenizer.encode(text, special=True)
    ]


def _strips(name: str) -> bool:
    return _STRIPPING.search(name) is not None


def _renamed(name: str, strips: bool) -> str:
    """A name that means the same to people and the other rule to llama.cpp."""
    return f"Phi-3 {name}" if strips else _STRIPPING.sub("Phi 3", name)


def _counted(different: Sequence[str], texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text) for text in different[:_TEXTS_SHOWN])
    return f"{len(different)} of {len(texts)} sample texts, such as {shown}"
