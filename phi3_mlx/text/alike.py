"""Whether two tokenizers have the same vocabulary."""

from __future__ import annotations

from functools import lru_cache

from .tokenizer import Tokenizer


@lru_cache(maxsize=4)
def first_difference(a: Tokenizer, b: Tokenizer) -> int | None:
    """The first id that means one thing in `a` and another in `b`, None if there is none.

    An added token that only one of them has is no difference: releases fill the end of their vocabularies differently.
    """
    if a is b:
        return None
    added = {token.id for tokenizer in (a, b) for token in tokenizer.added_tokens.values()}
    for number in range(max(a.vocab_size, b.vocab_size)):
        tokens = a.id_to_token(number), b.id_to_token(number)
        if tokens[0] != tokens[1] and not (None in tokens and number in added):
            return number
    return None
