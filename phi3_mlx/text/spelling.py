"""A tokenizer as llguidance sees it: the bytes of each id, how a text is spelled, and what was compiled for it."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ..errors import OptionError

if TYPE_CHECKING:
    from .vocabulary import Tokenizer

Value = TypeVar("Value")

# No tokenizer joins this with what follows. Where a space is added to a text, it stands before this.
_BEFORE = "\0"
# Characters that are spelled as the tokenizer does, or a long text would take a while at each of its tokens.
_SPELLED_AT_ONCE = 500
# Sets of tokens that the library allows as wholes where a text may still have as many characters. Others it looks up
# one by one. Its own few sets make the slowest masks, near the end of a text of limited length, take twice as long.
_OF_A_TEXT = r'[^"\\\x00-\x1F\x7F]'
_TOKEN_SETS = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_OF_A_TEXT}{{1,{n}}}" for n in (2, 4, 6, 8, 10, 14, 20, 30)),
    f"{_OF_A_TEXT}+",
]
# What is kept of the forms used last. A character of a form takes 300 bytes at most, so this is about 100 MB.
_FORMS_KEPT, _CHARACTERS_KEPT = 64, 300_000


class Kept(Generic[Value]):
    """What was made of the forms used last, for any thread: none is made twice while it is kept."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[str, str], Value] = OrderedDict()
        self._characters = 0
        self._changing = threading.Lock()

    def get(self, form: tuple[str, str], make: Callable[[], Value]) -> Value:
        """What `make` gives for a form (kind, text), now or before."""
        with self._changing:
            if form in self._values:
                self._values.move_to_end(form)
                return self._values[form]
        value = make()  # others need not wait for it; two threads may make the same
        with self._changing:
            if form in self._values or len(form[1]) > _CHARACTERS_KEPT:
                return value
            self._values[form] = value
            self._characters += len(form[1])
            while self._characters > _CHARACTERS_KEPT or len(self._values) > _FORMS_KEPT:
                (_, text), _ = self._values.popitem(last=False)
                self._characters -= len(text)
        return value


def guidance_library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            "schema, regex, grammar, choices and tools need llguidance, which is not installed: "
            'pip install "phi3-mlx[schema]"'
        ) from None
    return llguidance


class Spelling(NamedTuple):
    """The library's view of a tokenizer, whether it can spell every text, and the library's matchers of forms."""

    view: Any
    spells_all: bool
    matchers: Kept[Any]


_spellings: weakref.WeakKeyDictionary[Tokenizer, Spelling] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def spelling(tokenizer: Tokenizer) -> Spelling:
    """A tokenizer as the library sees it, made once."""
    with _making:
        made = _spellings.get(tokenizer)
        if made is None:
            guidance, spelled = guidance_library(), _Bytes(tokenizer)
            wrapped, stop_ids = guidance.TokenizerWrapper(spelled), sorted(tokenizer.stop_ids)
            view = guidance.LLTokenizer(wrapped, n_vocab=len(spelled.tokens), eos_token=stop_ids, slices=_TOKEN_SETS)
            _spellings[tokenizer] = made = Spelling(view, spelled.spells_all, Kept())
        return made


def ids_known(tokenizer: Tokenizer) -> int:
    """Ids up to the last; a configuration may end answers with one that the tokenizer has no token for."""
    return max(tokenizer.vocab_size, max(tokenizer.stop_ids) + 1)


class _Bytes:
    """The bytes of each id, as the library asks for them, and how the tokenizer spells a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = weakref.ref(tokenizer)  # or the library's view would keep it alive, and with it itself
        self.eos_token_id = min(tokenizer.stop_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.tokens += [b""] * (ids_known(tokenizer) - len(self.tokens))
        control = {token.id for token in tokenizer.added_tokens.values() if token.special or token.marked}
        self.special_token_ids = sorted(control | tokenizer.stop_ids)
        self._longest = max(map(len, self.tokens))
        special = {b"", *(self.tokens[token_id] for token_id in self.special_token_ids)}
        self._ids = {spelled: token_id for token_id, spelled in enumerate(self.tokens) if spelled not in special}
        self.spells_all = all(bytes([byte]) in self._ids for byte in range(256))

    def __call__(self, text: str) -> list[int]:
        """The ids of a text inside an answer; together their bytes are the text's.

        What is far from the beginning is spelled byte by byte: a mask depends on the first tokens alone, and the next
        asks again for the text behind them.
        """
        tokenizer, text, rest = self._tokenizer(), text[:_SPELLED_AT_ONCE], text[_SPELLED_AT_ONCE:]
        assert tokenizer is not None
        wanted = text.encode()
        ids, before = tokenizer.encode(_BEFORE + text), b""
        while ids and not before.endswith(_BEFORE.encode()):
            before += self.tokens[ids.pop(0)]
        if b"".join(self.tokens[token_id] for token_id in ids) != wanted:
            ids = self._longest_first(wanted)  # a tokenizer that changes texts before it encodes them
        return ids + [self._ids[bytes([byte])] for byte in rest.encode()]

    def _longest_first(self, text: bytes) -> list[int]:
        """Ids of the longest tokens that the text begins with, again and again."""
        ids: list[int] = []
        while text:
            length = next(n for n in range(self._longest, 0, -1) if text[:n] in self._ids)
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids
