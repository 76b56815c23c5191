"""How likely given texts are: the log-probability of each token of continuations of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.continuations import Continued, score_together
from ..engine.plan import check_length
from ..engine.prefill import common_length
from ..engine.prefixes import PrefixStore, check_store
from ..engine.tokens import check_ids
from ..errors import OptionError, PromptError
from ..models.decoder import Model
from ..text.spans import encode_after
from ..values import check_function, listed, shown, token_ids
from .answers import Prompt, encode_prompt
from .loading import check_loaded, check_tokenizer
from .request import Request

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

Continuation = str | Sequence[int]


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: its token ids, and the natural log-probability of each.

    `is_greedy`: whether every token was the model's likeliest in its place.
    """

    tokens: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


def score(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    continuations: Iterable[Continuation],
    *,
    raw: bool = Request.raw,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    prefixes: PrefixStore | None = None,
    force: bool = Request.force,
) -> list[Score]:
    """How likely each of some continuations is behind `prompt`, which is read once for all of them.

        best = max(score(model, tokenizer, question, answers), key=lambda score: score.total)

    `prompt`: a text (put into the model's chat template unless `raw`), a list of {"role", "content"} messages, or a
    list of token ids, as `generate` takes it. Each continuation is a text or a list of token ids. The numbers are those
    of reading prompt and continuation as one sequence, which has LongRoPE's regime of its whole length.

    Where a text's tokens begin: behind a chat prompt it is what the model says, encoded as it stands, without control
    tokens; a list of ids in front of it changes nothing of its tokens. Behind a raw text both are encoded as one
    text. Then all tokens are scored that the prompt alone does not have, so a space at the end of the prompt, and
    whatever else is in one token with the first characters, counts with the continuation. White space is never removed:
    " yes" and "yes" are two continuations.

    An empty prompt stands for the tokenizer's BOS token. `kv_bits` and `kv_group_size` pack the cache, and `prefixes`
    keeps what is read for what begins alike later, as `generate`'s.
    What the memory at hand cannot hold is refused unless `force`. Raises PromptError (with the index of a continuation
    that is empty), ChatError, OptionError or MemoryLimitError.
    """
    (scores,) = batch_score(
        model,
        tokenizer,
        [(prompt, continuations)],
        raw=raw,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        prefixes=prefixes,
        force=force,
    )
    return scores


def batch_score(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[tuple[Prompt, Iterable[Continuation]]],
    *,
    raw: bool = Request.raw,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    prefixes: PrefixStore | None = None,
    force: bool = Request.force,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Score]]:
    """As `score` of several pairs (prompt, continuations), computed together.

    Faults in the arguments are raised before anything is computed. `progress(done, total)` counts prompts.
    """
    check_loaded(model)
    check_tokenizer(tokenizer)
    check_function(progress, "progress")
    check_store(prefixes)
    request = Request(raw=raw, kv_bits=kv_bits, kv_group_size=kv_group_size, force=force)
    pairs = listed(prompts)
    if pairs is None:
        raise PromptError(f"prompts is {shown(prompts)}; give a list of (prompt, continuations)")
    joined = [_joined(model, tokenizer, pair, request.raw) for pair in pairs]
    scored = score_together(
        model, joined, kv_bits=request.cache_bits(), force=request.force, prefixes=prefixes, progress=progress
    )
    return [
        [
            Score(
                [*each.ids[each.scored_from :]],
                [token.logprob for token in tokens],
                all(token.is_likeliest for token in tokens),
            )
            for each, tokens in zip(continued, of_prompt, strict=True)
        ]
        for continued, of_prompt in zip(joined, scored, strict=True)
    ]


def _joined(model: Model, tokenizer: Tokenizer, pair: object, raw: bool) -> list[Continued]:
    """The prompt with each of its continuations."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise PromptError(f"prompts holds {shown(pair)}; give a list of (prompt, continuations)")
    prompt, given = pair
    continuations = listed(given)
    if continuations is None:
        raise OptionError(f"continuations is {shown(given)}; expected a list of texts or of lists of token ids")
    ids, text = _prompt_ids(tokenizer, prompt, raw), prompt if raw and isinstance(prompt, str) else None
    joined = []
    for index, continuation in enumerate(continuations):
        if isinstance(continuation, str):
            whole = _with_text(tokenizer, ids, text, continuation)
        else:
            more = token_ids(continuation)
            if more is None:
                raise OptionError(
                    f"continuation {index} is {shown(continuation)}; expected a text or a list of token ids"
                )
            whole = [*ids, *more]
        scored_from = common_length(ids, whole)
        if scored_from == len(whole):
            raise PromptError(f"continuation {index} is empty; give some text or token ids")
        if scored_from == 0:
            whole, scored_from = [_bos(tokenizer), *whole], 1
        check_ids(model, whole)
        check_length(model.config, len(whole) - 1)
        joined.append(Continued(tuple(whole), scored_from))
    return joined


def _prompt_ids(tokenizer: Tokenizer, prompt: Prompt, raw: bool) -> list[int]:
    """The ids of a prompt; an empty one has BOS alone."""
    if isinstance(prompt, str) and not prompt:
        return [_bos(tokenizer)]
    return encode_prompt(tokenizer, prompt, raw=raw) or [_bos(tokenizer)]


def _with_text(tokenizer: Tokenizer, ids: list[int], raw_prompt: str | None, text: str) -> list[int]:
    """The ids of a prompt and a text behind it. `raw_prompt`: the prompt's text, if it is encoded with the other's."""
    if raw_prompt is None:
        return [*ids, *encode_after(tokenizer, ids, text)]
    if raw_prompt:
        return encode_prompt(tokenizer, raw_prompt + text, raw=True)
    return [*ids, *tokenizer.encode(text, special=True)]


def _bos(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_token_id is None:
        raise PromptError("nothing stands before the first token, and this tokenizer has no BOS token; give a prompt")
    return tokenizer.bos_token_id
